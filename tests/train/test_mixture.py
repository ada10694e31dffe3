"""Tasks fit into the rows of every stage, or it is said before any step."""

import pytest

from kvjax.train.data import Mixture
from kvjax.train.recipe import DataConfig, Source, Stage

WIDE = Stage(steps=5, lengths={64: 1.0})


def made(*stages: Stage, fields: dict | None = None) -> Mixture:
    sources = (Source(task="recall", fields=fields or {}),)
    return Mixture(DataConfig(sources=sources), stages, 0)


@pytest.mark.parametrize("lengths", [{32: 1.0}, {64: 1.0, 32: 0.01}, {64: 1.0, 44: 0}])
def test_rows_that_a_task_does_not_fit_into(lengths):
    with pytest.raises(
        ValueError, match=r"stages\.1\.lengths.* of \d\d tokens.*recall"
    ):
        made(WIDE, Stage(steps=5, lengths=lengths))


def test_rows_that_hold_what_a_task_asks_for():
    narrow = made(WIDE, Stage(steps=99, lengths={48: 1.0}))
    for step in range(5, 60):
        assert narrow.batch(step).tokens.shape[1] == 48
    with pytest.raises(ValueError, match=r"stages\.0\.lengths.*recall"):
        made(WIDE, fields={"keys": 20})
    made(WIDE, fields={"value_length": 1, "keys": 2})


@pytest.mark.parametrize("step", [-1, 2**70, "1", 1.5, None])
def test_steps_are_counted_from_0(step):
    with pytest.raises(ValueError, match="`step` must be an integer"):
        made(WIDE).batch(step)
