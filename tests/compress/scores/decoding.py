"""Scores for long replies: what is held is ranked again and again."""

import numpy as np

from kvjax.scorers import RKV
from tests.compress.samples import Sample
from tests.compress.scores.cases import Case
from tests.reference.rkv import rkv_scores


def in_place(sample: Sample, row: int) -> dict[str, np.ndarray]:
    """Where the tokens of a row are, as the references want it."""
    at = np.arange(sample.lengths[row])
    heads = sample.inputs.spec.num_kv_heads
    return {"positions": np.tile(at, (heads, 1)), "q_positions": at}


def rkv(**options):
    """R-KV of a row."""

    def score(sample: Sample, row: int, n: int) -> np.ndarray:
        del n
        q, k, _ = sample.row(row)
        return rkv_scores(q, k, **in_place(sample, row), **options)

    return score


CASES = {
    "rkv": [
        Case(RKV(), rkv()),
        Case(
            RKV(window=16, kernel=3, mix=0.5, threshold=0.3),
            rkv(window=16, kernel=3, mix=0.5, threshold=0.3),
        ),
        Case(RKV(window=1, kernel=1, mix=1.0), rkv(window=1, kernel=1, mix=1.0)),
        Case(RKV(window=40, mix=0.0), rkv(window=40, mix=0.0)),
    ],
}
