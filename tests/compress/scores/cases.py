"""A score beside its reference in NumPy, and how the two compare."""

import dataclasses
from collections.abc import Callable

import numpy as np

from kvjax.scorers import AbstractScorer
from tests import reference
from tests.compress.samples import Sample


def values(ours: np.ndarray, theirs: np.ndarray) -> None:
    """The same numbers, the same tokens protected."""
    np.testing.assert_array_equal(np.isposinf(ours), np.isposinf(theirs))
    finite = np.isfinite(theirs)
    np.testing.assert_allclose(ours[finite], theirs[finite], rtol=1e-4)


def up_to_scale(ours: np.ndarray, theirs: np.ndarray) -> None:
    """As `values`, but each head may have a positive factor of its own."""
    for mine, other in zip(ours, theirs, strict=True):
        values(
            mine / mine[np.isfinite(mine)].sum(),
            other / other[np.isfinite(other)].sum(),
        )


def order_newest_first(ours: np.ndarray, theirs: np.ndarray) -> None:
    """The same ranking, if of the reference's protected tokens the newest comes first.

    The sinks, which both protect, aside.
    """
    sinks = np.isposinf(ours)
    assert np.isposinf(theirs[sinks]).all()
    index = np.arange(theirs.shape[-1])
    theirs = np.where(np.isposinf(theirs), 2.0 + index, theirs)
    for mine, other, sink in zip(ours, theirs, sinks, strict=True):
        np.testing.assert_array_equal(
            np.argsort(-mine[~sink], kind="stable"),
            np.argsort(-other[~sink], kind="stable"),
        )


@dataclasses.dataclass(frozen=True)
class Case:
    """A scorer, the reference call that it follows, and how the two compare."""

    scorer: AbstractScorer
    expected: Callable[[Sample, int, int], np.ndarray]
    compare: Callable[[np.ndarray, np.ndarray], None] = values


def plain(name: str, **options):
    """The reference `score_<name>` with options."""
    function = getattr(reference, f"score_{name}")
    return lambda sample, row, n: function(*sample.row(row), **options)
