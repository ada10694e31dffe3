"""An uninterrupted run, and what another one must make of a part of it."""

import pathlib
import shutil

import jax
import numpy as np

from kvjax.train.recipe import TrainConfig
from kvjax.train.run import run
from kvjax.train.run.step import TrainState
from kvjax.train.run.stored import steps_in
from tests.train.tiny_run import losses, recipe

Whole = tuple[TrainState, pathlib.Path]


def copied(whole: Whole, tmp_path: pathlib.Path, last: int = 6) -> pathlib.Path:
    """The run as it was when `last` was its newest checkpoint, log and all."""
    path = tmp_path / "copy"
    shutil.copytree(whole[1], path)
    for step in steps_in(path / "checkpoints"):
        if step > last:
            shutil.rmtree(path / "checkpoints" / f"step_{step}")
    return path


def goes_on(
    whole: Whole, directory: pathlib.Path, config: TrainConfig | None = None
) -> None:
    """The run in `directory` ends as the uninterrupted one did, bit for bit.

    `config` is the recipe of both; None: the plain one.
    """
    state = run(config or recipe(), directory)
    assert losses(directory) == losses(whole[1])
    assert [step for step, _ in losses(directory)] == [1, 2, 3, 4, 5, 6]
    jax.tree.map(np.testing.assert_array_equal, state, whole[0])
    checkpoints = directory / "checkpoints"
    names = {path.name for path in checkpoints.iterdir()}
    assert names == {f"step_{step}" for step in steps_in(checkpoints)}
