"""Scores of methods that divide slots among layers."""

import numpy as np

from kvjax.scorers import Cake, Lava
from tests.compress.samples import Sample
from tests.compress.scores.cases import Case
from tests.reference import layer_budgets


def in_order(sample: Sample, row: int) -> dict[str, np.ndarray]:
    """Positions of a row whose heads hold all of its tokens."""
    index = np.arange(sample.lengths[row])
    heads = sample.inputs.spec.num_kv_heads
    return {"positions": np.tile(index, (heads, 1)), "q_positions": index}


def cake(**options):
    """CAKE of a row."""

    def score(sample: Sample, row: int, n: int):
        q, k, _ = sample.row(row)
        return layer_budgets.cake_scores(q, k, **in_order(sample, row), **options)

    return score


def lava(**options):
    """LAVa of a row."""

    def score(sample: Sample, row: int, n: int):
        given = sample.row(row)
        return layer_budgets.lava_scores(*given, **in_order(sample, row), **options)

    return score


CASES = {
    "cake": [
        Case(Cake(window=16), cake(window=16)),
        Case(Cake(window=7, gamma=3.0, kernel=1), cake(window=7, gamma=3.0, kernel=1)),
    ],
    "lava": [
        Case(Lava(window=16), lava(window=16)),
        Case(Lava(window=5, kernel=1), lava(window=5, kernel=1)),
    ],
}
