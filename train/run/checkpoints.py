"""Checkpoints of a run, by orbax: `DIRECTORY/step_N`, written in the background.

A checkpoint has its name only when it is complete. Leaves are stored by name, and with
each a sum over its bits: compression inside the files leaves some flipped bits unseen.
"""

import contextlib
import math
import pathlib
import shutil
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from orbax.checkpoint import v1 as ocp

from kvjax.train.recipe import KeepConfig
from kvjax.train.recipe.output import HIGHER
from kvjax.train.run import processes
from kvjax.train.run.stored import (
    DIGESTS,
    STEP,
    cause,
    metadata,
    named,
    path_of,
    short,
    steps_in,
    sums,
    unwritten,
    whole,
)


def restore[S](directory: pathlib.Path, state: S, resume: int | None = None) -> S:
    """The newest checkpoint of `directory` in the shape of `state`, or `state`.

    Args:
        directory: of the checkpoints; it need not exist.
        state: a fresh one; leaves come back where its leaves are.
        resume: the step to go back to instead. Later checkpoints are removed once
            this one has been read.

    Raises:
        ValueError: no such step; a checkpoint that is damaged (named, with the one
            before it) or that holds other leaves.
    """
    steps = steps_in(directory)
    if resume is not None and resume not in steps:
        raise ValueError(
            f"`resume` asks for step {resume}; {directory} has checkpoints of "
            f"{steps or 'no step'}. Give one of them, or leave `resume` out."
        )
    if not steps:
        return state
    step = steps[-1] if resume is None else resume
    leaves = named(state)
    try:
        loaded = _load(path_of(directory, step), leaves)
    except Exception as wrong:  # whatever the many layers below make of damage
        raise _damaged(directory, step, cause(wrong)) from wrong
    processes.barrier("restored")
    for later in steps[steps.index(step) + 1 :] if processes.first() else ():
        shutil.rmtree(path_of(directory, later))  # orbax deletes no damaged ones
    processes.barrier("removed")
    values = [loaded[name] for name in leaves]
    return jax.tree.unflatten(jax.tree.structure(state), values)


class _OtherLeaves(ValueError):
    """A sound checkpoint of something else."""


def _load(path: pathlib.Path, leaves: Mapping[str, Array]) -> dict[str, Array]:
    held = metadata(path)
    _compare(path, {n: x.shape for n, x in held.items()}, leaves)
    digests = jax.ShapeDtypeStruct((len(leaves),), jnp.uint32, sharding=_where(leaves))
    loaded: Any = ocp.load(str(path), {**leaves, DIGESTS: digests})
    wanted = np.asarray(loaded.pop(DIGESTS))
    got, _ = sums([loaded[name] for name in leaves])
    wrong = [n for n, bad in zip(leaves, np.asarray(got) != wanted, strict=True) if bad]
    if wrong:
        raise ValueError(f"{len(wrong)} arrays are not what was saved, as {wrong[0]!r}")
    return loaded


def _where(leaves: Mapping[str, Array]) -> jax.sharding.Sharding:
    one = next(iter(leaves.values())).sharding
    return whole(one) or one


def _compare(path: pathlib.Path, held: Mapping[str, Any], leaves: Mapping) -> None:
    """The checkpoint holds the leaves of this recipe."""
    wanted = {name: x.shape for name, x in leaves.items()}
    stored = {name: tuple(shape) for name, shape in held.items() if name != DIGESTS}
    for name in sorted({*wanted, *stored}):
        if wanted.get(name) != stored.get(name):
            raise _OtherLeaves(
                f"{path} is of another recipe or optimizer: {name!r} has shape "
                f"{stored.get(name, 'none')} there and {wanted.get(name, 'none')} "
                "here. Train into another directory."
            )


def _damaged(directory: pathlib.Path, step: int, why: Exception) -> ValueError:
    if isinstance(why, _OtherLeaves):
        return why
    before = [other for other in steps_in(directory) if other < step]
    remedy = "There is none before it: train again, into another directory."
    if before:
        remedy = (
            f"The one before it is of step {before[-1]}: go back to it with "
            f"`--set resume={before[-1]}`, which removes the damaged one."
        )
    return ValueError(
        f"the checkpoint {path_of(directory, step)} is damaged ({short(why)}). {remedy}"
    )


class Checkpoints:
    """Writes the checkpoints of a run; a context manager.

    What an interrupted save or removal left behind is removed first, so restore
    before.

    Args:
        directory: of the checkpoints.
        keep: which of them stay.

    Raises:
        OSError: the directory cannot be written.
    """

    def __init__(self, directory: pathlib.Path, keep: KeepConfig):
        self.directory, self.keep = directory.absolute(), keep
        directory.mkdir(parents=True, exist_ok=True)
        # Any: orbax's policies are not of the types that its own checkpointer declares.
        policies: Any = ocp.training.preservation_policies
        always: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
        best = policies.BestN(
            get_metric_fn=self._rank,
            n=keep.best,
            keep_checkpoints_without_metrics=False,
        )
        if processes.first():
            _clean(directory)
        processes.barrier("cleaned")
        self._orbax = ocp.training.Checkpointer(
            str(self.directory),
            # When to save is the loop's decision; left alone, orbax skips a save
            # while another one is under way.
            save_decision_policy=always,
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(keep.newest), best]
            ),
            step_name_format=ocp.path.step.standard_name_format(step_prefix="step"),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        wrong: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except OSError as late:
            if wrong is None:
                raise
            wrong.add_note(str(late))
        finally:
            self._close()

    @property
    def last_saved(self) -> pathlib.Path | None:
        """The newest complete checkpoint, once it is."""
        with contextlib.suppress(OSError):  # the caller is telling of something else
            self.wait()
        steps = steps_in(self.directory)
        return path_of(self.directory, steps[-1]) if steps else None

    def improves(self, metrics: Mapping[str, Any] | None) -> bool:
        """Whether no checkpoint has better metrics."""
        if metrics is None or not self.keep.best:
            return False
        held: list[Any] = [c.metrics for c in self._orbax.checkpoints if c.metrics]
        better = all(self._rank(metrics) > self._rank(other) for other in held)
        return processes.agreed(better)  # they must all save, or none

    def save(self, state: Any, metrics: Mapping[str, Any] | None = None) -> None:
        """Copy `state`, and write it while training goes on.

        Args:
            state: with its `step`.
            metrics: `stage` and held-out metrics by name, if they were measured here.

        Raises:
            OSError: this save or the one before it failed; what is kept is named.
        """
        leaves = named(state)
        digests, _ = sums(list(leaves.values()))
        tree = {**leaves, DIGESTS: digests}
        self.wait()
        step = int(state.step)
        try:
            self._orbax.save_async(step, tree, metrics=dict(metrics or {}) or None)
        except Exception as wrong:
            raise self._failed(wrong) from wrong

    def wait(self) -> None:
        """Until what is being written is complete.

        Raises:
            OSError: it could not be written; what is kept is named.
        """
        try:
            self._orbax.wait()
        except Exception as wrong:
            raise self._failed(wrong) from wrong

    def _close(self) -> None:
        try:
            self._orbax.close()
        except Exception:  # `wait` has raised it before
            return

    def _rank(self, metrics: Mapping[str, Any]) -> tuple[float, float]:
        """Sorts the best last: the later stage, then the metric."""
        value = metrics.get(self.keep.metric)
        if value is None or not math.isfinite(value):
            return -1.0, 0.0
        sign = 1.0 if self.keep.metric in HIGHER else -1.0
        return float(metrics["stage"]), sign * value

    def _failed(self, wrong: Exception) -> OSError:
        return unwritten("a checkpoint", self.directory, wrong, self.directory)


def _clean(directory: pathlib.Path) -> None:
    """Remove what a killed process left of a save or of a removal."""
    for path in directory.glob("step_*"):
        if not STEP.fullmatch(path.name):
            shutil.rmtree(path)
    for step in steps_in(directory)[:-1]:
        path = path_of(directory, step)
        try:
            metadata(path)
        except Exception as wrong:
            said = short(cause(wrong))
            print(f"{path} is damaged or half removed ({said}); removed.", flush=True)
            shutil.rmtree(path)
