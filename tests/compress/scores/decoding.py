"""Scores for long replies: what is held is ranked again and again."""

import numpy as np

from kvjax.scorers import RKV, TriAttention
from tests.compress.samples import Sample
from tests.compress.scores.cases import Case
from tests.reference.rkv import rkv_scores
from tests.reference.triattention import query_statistics, triattention_scores


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


def triattention(**options):
    """TriAttention of a row whose queries are all there is."""

    def score(sample: Sample, row: int, n: int) -> np.ndarray:
        del n
        q, k, _ = sample.row(row)
        at, frequencies = in_place(sample, row), sample.inv_freq
        asked = query_statistics(q, at["q_positions"], frequencies)
        given = {"frequencies": frequencies, "start": len(at["q_positions"])}
        return triattention_scores(
            k, *asked, positions=at["positions"], **given, **options
        )

    return score


def by_spread(ours: np.ndarray, theirs: np.ndarray) -> None:
    """The same numbers, of which some lie near 0, as a head's differ."""
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * theirs.std(), rtol=0)


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
    "triattention": [
        Case(
            TriAttention(),
            triattention(n_offsets=17, normalise=True, group="max"),
            by_spread,
        ),
        Case(
            TriAttention(n_offsets=5, normalise=False, group="mean"),
            triattention(n_offsets=5),
            by_spread,
        ),
    ],
}
