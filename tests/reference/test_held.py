"""On held tokens, slots mean nothing: worked examples and exact properties."""

import numpy as np
import pytest

from tests.reference import layer_budgets as budgets
from tests.reference import probes, rkv, triattention
from tests.reference.base import attention
from tests.reference.held import attention_to_held, pool, turn
from tests.reference.rows import FREQUENCIES, D, H, K, S, scattered


def test_weights_agree_with_the_plain_attention(row):
    q, k, _, positions, places = row
    ours = attention_to_held(q, k, positions=positions, q_positions=places)
    np.testing.assert_allclose(ours, attention(q, k), atol=1e-14)


SCORERS = {
    "cake": lambda q, k, v, a: budgets.cake_scores(q, k, window=6, **a),
    "lava": lambda q, k, v, a: budgets.lava_scores(q, k, v, window=6, **a),
    "rkv": lambda q, k, v, a: rkv.rkv_scores(q, k, **a),
    "rkv_sliding": lambda q, k, v, a: rkv.rkv_importance(q, k, sliding=9, **a),
    "kvzip": lambda q, k, v, a: probes.kvzip_chunk_scores(
        q[:, :12],
        k,
        np.ones((K, 12, D)),
        positions=a["positions"],
        q_positions=S + np.arange(12),
        start=10,
        end=30,
        softcap=3.0,
    ),
    "triattention": lambda q, k, v, a: triattention.triattention_scores(
        k,
        *triattention.query_statistics(q, a["q_positions"], FREQUENCIES),
        positions=a["positions"],
        frequencies=FREQUENCIES,
        start=S,
        normalise=True,
    ),
}


@pytest.mark.parametrize("name", SCORERS)
def test_scores_go_by_positions(draw, row, name):
    q, k, v, positions, places = row
    score = SCORERS[name]
    plain = score(q, k, v, {"positions": positions, "q_positions": places})
    slots, moved, k2, v2 = scattered(draw, positions, k, v)
    order = draw.permutation(S)
    also = score(
        q[:, order] if name != "kvzip" else q,
        k2,
        v2,
        {"positions": moved, "q_positions": places[order]},
    )
    for n in range(K):
        np.testing.assert_allclose(also[n, slots[n]], plain[n], rtol=1e-9)
        assert not (also[n, moved[n] < 0] > 0).any()


def test_pool_by_rank_and_by_distance():
    x, positions = np.array([1.0, 8.0, 3.0, 99.0]), np.array([0, 5, 6, -1])
    ranked = pool(x, positions, kernel=3, how="max")
    np.testing.assert_array_equal(ranked[:3], [8, 8, 8])
    near = pool(x, positions, kernel=3, how="max", by="distance")
    np.testing.assert_array_equal(near[:3], [1, 8, 8])
    mean = pool(x, positions, kernel=3, how="mean", by="distance")
    np.testing.assert_allclose(mean[:3], [1 / 3, 11 / 3, 11 / 3])


def test_rkv_spares_the_newest_of_alike_keys():
    k = np.eye(6)[None, [0, 0, 0, 1, 2]]
    positions = np.array([[7, 1, 4, 2, 3]])
    redundancy = rkv.rkv_redundancy(k, positions=positions)[0]
    # Mean cosines: 2/5 at position 1, 1/5 at 4 (7 spares it), none at 7.
    np.testing.assert_allclose(redundancy[1] / redundancy[3], np.exp(0.4))
    np.testing.assert_allclose(redundancy[2] / redundancy[3], np.exp(0.2))
    np.testing.assert_allclose(redundancy[0], redundancy[3])
    np.testing.assert_allclose(redundancy.sum(), 1.0)


def test_triattention_of_constant_queries_is_their_product(draw):
    plain, places = draw.normal(size=(H, 1, D)), np.arange(30)
    q = turn(np.repeat(plain, 30, 1), places[None], FREQUENCIES)
    mean, mean_abs = triattention.query_statistics(q, places, FREQUENCIES)
    np.testing.assert_allclose(np.abs(mean), mean_abs)
    k, positions = draw.normal(size=(K, 20, D)), draw.permutation(40).reshape(K, 20)
    scores = triattention.triattention_head_scores(
        k,
        mean,
        mean_abs,
        positions=positions,
        frequencies=FREQUENCIES,
        start=40,
        n_offsets=5,
    )
    for h in range(H):
        later = [
            turn(plain[h, 0], np.array(40 + d), FREQUENCIES) for d in (1, 2, 4, 8, 16)
        ]
        np.testing.assert_allclose(
            scores[h], np.mean(k[h // 2] @ np.array(later).T, -1)
        )
