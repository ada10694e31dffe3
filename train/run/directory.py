"""The directory of a run: who may write to it, its recipe, and what that reads."""

import contextlib
import dataclasses
import fnmatch
import logging
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from kvjax.files import read_yaml, write_text
from kvjax.inputs import Inputs, check_same
from kvjax.messages import shown
from kvjax.places import ELSEWHERE, busy, check_place, clear_left, held
from kvjax.train.recipe import TrainConfig, as_tree
from kvjax.train.recipe.files import INPUTS, decode_recipe
from kvjax.train.run import processes
from kvjax.train.run.exported import check_exported
from kvjax.train.run.inputs import inputs_of
from kvjax.train.run.stored import steps_in, writing

FREE = (
    "resume",
    "mesh.*",
    "loop_layers",
    "log_every",
    "eval_every",
    "save_every",
    "eval_items",
    "cached.*",
    "keep.*",
    "log.*",
)
"""Fields that may change while a run goes on: none changes a weight, rounding aside."""

LOG = logging.getLogger("kvjax.train")


@dataclasses.dataclass(frozen=True)
class Claim:
    """A directory that no other run writes to.

    Attributes:
        directory: of the run.
        config: its recipe.
        inputs: digests of what the recipe reads; in the first process.
    """

    directory: pathlib.Path
    config: TrainConfig
    inputs: Inputs

    def begin(self) -> None:
        """Write `recipe.yaml`: all fields, and the digests under `inputs`.

        A default that changes must not change a run that goes on.

        Raises:
            OSError: it cannot be written.
        """
        if not processes.first():
            return
        tree = as_tree(dataclasses.replace(self.config, resume=None))
        tree[INPUTS] = self.inputs
        text = yaml.safe_dump(tree, sort_keys=False, width=88, allow_unicode=True)
        path = self.directory / "recipe.yaml"
        with writing("the recipe", path, self.directory / "checkpoints"):
            write_text(path, text)


def check_directory(directory: pathlib.Path) -> None:
    """A run may be written to `directory`, whatever its recipe.

    Raises:
        ValueError: it cannot be written to, or is that of an evaluation.
    """
    check_place(directory)
    if (directory / "run.json").exists():
        raise ValueError(
            f"{directory} is the directory of an evaluation (run.json). {ELSEWHERE}."
        )


@contextlib.contextmanager
def claimed(directory: pathlib.Path, config: TrainConfig) -> Iterator[Claim]:
    """While inside, no other run writes to `directory`; nothing is computed before.

    What is in `FREE` may differ from an earlier run, and the steps of the last stage.
    The contents of what the recipe reads may not; a run of an earlier version, which
    kept no digests of them, goes on and has them from then on.

    Raises:
        ValueError: the directory cannot be written to, is that of an evaluation or of
            another run that still goes on, or holds a model that no run made there;
            it has checkpoints of another recipe, or of inputs that have changed since:
            the first field or file that differs is named.
        OSError: it cannot be made.
    """
    check_directory(directory)
    resumes = bool(steps_in(directory / "checkpoints"))
    check_exported(directory, resumes)
    old = _earlier(directory / "recipe.yaml", config) if resumes else {}
    processes.barrier("recipe")  # nobody writes what another one still compares
    with contextlib.ExitStack() as stack:
        mine = not processes.first() or stack.enter_context(held(directory))
        if processes.agreed(not mine):
            raise busy(directory)
        if processes.first():
            clear_left(directory)
        yield Claim(directory, config, _inputs(config, old))


def _inputs(config: TrainConfig, old: Inputs) -> Inputs:
    """Digests of inputs, those of an earlier call compared; by the first process."""
    new: Inputs = {}
    wrong: ValueError | None = None
    if processes.first():
        try:
            new = inputs_of(config, old)
            check_same(old, new)
        except ValueError as found:
            wrong = found
    if processes.agreed(wrong is not None):
        raise wrong or ValueError("the first process refuses its inputs; it says why.")
    return new


def _earlier(path: pathlib.Path, config: TrainConfig) -> Inputs:
    """The inputs of the run that is there, whose recipe must be the same."""
    if not path.is_file():
        raise ValueError(
            f"{path.parent} has checkpoints and no recipe.yaml. {ELSEWHERE}."
        )
    try:
        tree = read_yaml(path)
        kept, inputs = INPUTS in tree, tree.pop(INPUTS, {})
        _check_inputs(inputs)
        old = decode_recipe(tree)
    except ValueError as wrong:
        raise ValueError(f"{path} cannot be read: {wrong} {ELSEWHERE}.") from None
    _check_recipe(path, old, config)
    if not kept:
        LOG.warning("%s has no digests of what the run reads: not compared", path)
    return inputs


def _check_inputs(tree: Any) -> None:
    files = tree.values() if isinstance(tree, Mapping) else [tree]
    if not all(
        isinstance(one, Mapping) and all(isinstance(d, str) and d for d in one.values())
        for one in files
    ):
        raise ValueError(f"`{INPUTS}` must be digests by file; got {shown(tree)}.")


def _check_recipe(path: pathlib.Path, old: TrainConfig, config: TrainConfig) -> None:
    last = f"stages.{len(old.stages) - 1}.steps"
    before, now = (dict(_flat(dataclasses.asdict(one))) for one in (old, config))
    for name in dict.fromkeys([*now, *before]):
        free = name == last or any(fnmatch.fnmatch(name, free) for free in FREE)
        if not free and before.get(name) != now.get(name):
            raise ValueError(
                f"{path.parent} holds a run of another recipe: `{name}` is "
                f"{shown(before.get(name))} there and {shown(now.get(name))} here. "
                f"{ELSEWHERE}, or go on with the recipe that is there: --config {path}"
            )


def _flat(tree: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Scalars by dotted path; what is empty counts as one."""
    if isinstance(tree, Mapping) and tree:
        pairs = list(tree.items())
    elif isinstance(tree, Sequence) and not isinstance(tree, str) and tree:
        pairs = list(enumerate(tree))
    else:
        yield at, tree
        return
    for key, value in pairs:
        yield from _flat(value, f"{at}.{key}" if at else str(key))
