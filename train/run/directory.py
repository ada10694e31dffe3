"""The recipe of a run, kept in its directory: another one is refused there."""

import contextlib
import dataclasses
import fnmatch
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import filelock
import yaml

from kvjax.config import decode
from kvjax.train.recipe import TrainConfig, as_tree
from kvjax.train.run import processes
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


@contextlib.contextmanager
def claimed(directory: pathlib.Path, config: TrainConfig) -> Iterator[None]:
    """While inside, no other run writes to `directory`; its recipe is in `recipe.yaml`.

    What is in `FREE` may differ from an earlier run, and the steps of the last stage.

    Raises:
        ValueError: the directory has checkpoints of another recipe; the first field
            that differs is named. Or another run is writing to it.
        OSError: it cannot be written.
    """
    if steps_in(directory / "checkpoints"):
        _check_same(directory / "recipe.yaml", config)
    processes.barrier("recipe")  # nobody writes what another one still compares
    with _locked(directory):
        if processes.first():
            # All fields: a default that changes must not change a run that goes on.
            tree = as_tree(dataclasses.replace(config, resume=None))
            text = yaml.safe_dump(tree, sort_keys=False, width=88)
            path = directory / "recipe.yaml"
            with writing("the recipe", path, directory / "checkpoints"):
                replace_text(path, text)
        yield


@contextlib.contextmanager
def _locked(directory: pathlib.Path) -> Iterator[None]:
    """The directory, made and held by the first process; a kill lets go of it, too."""
    lock = filelock.FileLock(directory / ".lock")
    busy = False
    if processes.first():
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            busy = True
    if processes.agreed(busy):
        raise ValueError(
            f"another run is writing to {directory}. Wait for it or stop it, or give "
            "another directory with --out."
        )
    try:
        yield
    finally:
        lock.release()


def replace_text(path: pathlib.Path, text: str) -> None:
    """All of the file or none of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_same(path: pathlib.Path, config: TrainConfig) -> None:
    elsewhere = "Give another directory with --out"
    if not path.is_file():
        raise ValueError(
            f"{path.parent} has checkpoints and no recipe.yaml. {elsewhere}."
        )
    try:
        old = decode(yaml.safe_load(path.read_text(encoding="utf-8")), TrainConfig)
    except (ValueError, yaml.YAMLError) as wrong:
        raise ValueError(f"{path} cannot be read ({wrong}). {elsewhere}.") from None
    last = f"stages.{len(old.stages) - 1}.steps"
    before, now = (dict(_flat(dataclasses.asdict(one))) for one in (old, config))
    for name in dict.fromkeys([*now, *before]):
        free = name == last or any(fnmatch.fnmatch(name, free) for free in FREE)
        if not free and before.get(name) != now.get(name):
            raise ValueError(
                f"{path.parent} holds a run of another recipe: `{name}` is "
                f"{before.get(name)!r} there and {now.get(name)!r} here. {elsewhere}, "
                f"or go on with the recipe that is there: --config {path}"
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
