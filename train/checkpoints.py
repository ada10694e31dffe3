"""Checkpoints of a run, by orbax: `DIRECTORY/step_N`, written in the background.

A checkpoint has its name only when it is complete. Leaves are stored by name, and with
each a sum over its bits: compression inside the files leaves some flipped bits unseen.
"""

import errno
import json
import math
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt32
from orbax.checkpoint import v1 as ocp

from kvjax.train.parts import HIGHER, KeepConfig

STEP = re.compile(r"step_(\d+)")
DIGESTS = "digests"


def steps_in(directory: pathlib.Path) -> list[int]:
    """The steps of which `directory` has a complete checkpoint, ascending."""
    found = (STEP.fullmatch(path.name) for path in directory.glob("step_*"))
    return sorted(int(match[1]) for match in found if match)


def path_of(directory: pathlib.Path, step: int) -> pathlib.Path:
    """The checkpoint of one step."""
    return directory.absolute() / f"step_{step}"


def named(state: Any) -> dict[str, Array]:
    """The leaves of a state by their paths, `opt_state.1.0.mu.layers.0.mlp.up.kernel`.

    Names outlive what numbers do not: an optimizer state that gains or loses a leaf.
    """
    flat, _ = jax.tree.flatten_with_path(state)
    pairs = [(jax.tree_util.keystr(p, simple=True, separator="."), x) for p, x in flat]
    return dict(pairs)


@jax.jit
def _sums(leaves: Sequence[Array]) -> tuple[UInt32[Array, "N"], Bool[Array, "N"]]:
    """Of each leaf, the sum of its bits as whole numbers, and whether it is finite."""

    def bits(x: Array) -> Array:
        if x.dtype == jnp.bool_:
            return x.astype(jnp.uint32)
        size = min(8 * x.dtype.itemsize, 32)
        return jax.lax.bitcast_convert_type(x, f"uint{size}").astype(jnp.uint32)

    finite = [
        jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.bool_(1)
        for x in leaves
    ]
    sums = [bits(x).sum(dtype=jnp.uint32) for x in leaves]
    return jnp.stack(sums), jnp.stack(finite)


def not_finite(state: Any) -> list[str]:
    """Names of the leaves that hold NaN or infinity."""
    leaves = named(state)
    _, finite = _sums(list(leaves.values()))
    return [n for n, ok in zip(leaves, np.asarray(finite), strict=True) if not ok]


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
        raise _damaged(directory, step, _cause(wrong)) from wrong
    for later in steps[steps.index(step) + 1 :]:
        ocp.delete(str(path_of(directory, later)))
    values = [loaded[name] for name in leaves]
    return jax.tree.unflatten(jax.tree.structure(state), values)


class _OtherLeaves(ValueError):
    """A sound checkpoint of something else."""


def _load(path: pathlib.Path, leaves: Mapping[str, Array]) -> dict[str, Array]:
    held = _metadata(path)
    _compare(path, {n: x.shape for n, x in held.items()}, leaves)
    digests = jnp.zeros(len(leaves), jnp.uint32)
    loaded: Any = ocp.load(str(path), {**leaves, DIGESTS: digests})
    wanted = np.asarray(loaded.pop(DIGESTS))
    got, _ = _sums([loaded[name] for name in leaves])
    wrong = [n for n, bad in zip(leaves, np.asarray(got) != wanted, strict=True) if bad]
    if wrong:
        raise ValueError(f"{len(wrong)} arrays are not what was saved, as {wrong[0]!r}")
    return loaded


def _metadata(path: pathlib.Path) -> dict[str, Any]:
    """Shapes and dtypes of a checkpoint's leaves; raises where it is damaged."""
    held: Any = ocp.metadata(str(path))
    if None in (held.commit_timestamp_nsecs, held.metadata):  # orbax makes that of it
        raise ValueError("its metadata cannot be read")
    # orbax opens no directory in which one of these is damaged, and has no reader.
    metrics = path / "metrics" / "metrics"
    if metrics.exists():
        json.loads(metrics.read_text())
    return held.metadata


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
        f"the checkpoint {path_of(directory, step)} is damaged ({_short(why)}). "
        f"{remedy}"
    )


def _cause(wrong: BaseException) -> Exception:
    while wrong.__cause__ is not None:
        wrong = wrong.__cause__
    return wrong if isinstance(wrong, Exception) else ValueError(str(wrong))


def _short(why: Exception) -> str:
    return f"{type(why).__name__}: {why}".splitlines()[0][:200]


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
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=self._rank, n=keep.best, keep_checkpoints_without_metrics=False
        )
        if jax.process_index() == 0:
            _clean(directory)
        self._orbax = ocp.training.Checkpointer(
            str(self.directory),
            # When to save is the loop's decision; left alone, orbax skips a save
            # while another one is under way.
            save_decision_policy=(
                ocp.training.save_decision_policies.FixedIntervalPolicy(1)
            ),
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
    def newest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        steps = steps_in(self.directory)
        return steps[-1] if steps else None

    def improves(self, metrics: Mapping[str, Any] | None) -> bool:
        """Whether no checkpoint has better metrics."""
        if metrics is None or not self.keep.best:
            return False
        held = [c.metrics for c in self._orbax.checkpoints if c.metrics]
        return all(self._rank(metrics) > self._rank(other) for other in held)

    def save(self, state: Any, metrics: Mapping[str, Any] | None = None) -> None:
        """Copy `state`, and write it while training goes on.

        Args:
            state: with its `step`.
            metrics: `stage` and held-out metrics by name, if they were measured here.

        Raises:
            OSError: this save or the one before it failed; what is kept is named.
        """
        leaves = named(state)
        digests, _ = _sums(list(leaves.values()))
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
        cause = _cause(wrong)
        kept = steps_in(self.directory)
        code = cause.errno if isinstance(cause, OSError) else None
        full = code == errno.ENOSPC or "No space left" in str(cause)
        names = ", ".join(f"step_{step}" for step in kept) or "none yet"
        return OSError(
            f"a checkpoint could not be written to {self.directory} "
            f"({_short(cause)}). Complete ones are kept: {names}. "
            f"{'Free some space' if full else 'Fix that'} and give the same command "
            "again."
        )


def _clean(directory: pathlib.Path) -> None:
    """Remove what a killed process left of a save or of a removal."""
    for path in directory.glob("step_*"):
        if not STEP.fullmatch(path.name):
            shutil.rmtree(path)
    for step in steps_in(directory)[:-1]:
        path = path_of(directory, step)
        try:
            _metadata(path)
        except Exception as wrong:
            why = _short(_cause(wrong))
            print(f"{path} is damaged or half removed ({why}); removed.", flush=True)
            shutil.rmtree(path)
