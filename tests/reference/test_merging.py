"""References of merging: worked examples and exact properties."""

import numpy as np

from tests.reference import merging
from tests.reference.held import kept_positions, turn
from tests.reference.rows import FREQUENCIES, D, K, S, scattered


def test_cam_gives_away_what_it_says(draw, row):
    _, _, v, positions, _ = row
    received = draw.gamma(1, size=(K, S))
    kept = draw.uniform(size=(K, S)) < 0.5
    kept[:, -1] = True  # so that all have a receiver
    merged = merging.cam_values(v, received, kept, positions=positions, budget=3)
    for n in range(K):
        given = np.zeros(D)
        for i in np.flatnonzero(~kept[n]):
            after = [j for j in range(i, S) if kept[n, j]][:3]
            given += min(1, received[n, i] / received[n, after].mean()) * v[n, i]
        np.testing.assert_allclose((merged - v)[n][kept[n]].sum(0), given)
    slots, moved, v2, r2, k2 = scattered(draw, positions, v, received, kept)
    also = merging.cam_values(
        v2, r2, (k2 > 0) & (moved >= 0), positions=moved, budget=3
    )
    for n in range(K):
        np.testing.assert_allclose(also[n, slots[n]], merged[n])


def test_d2o_mixes_and_turns(draw, row):
    _, k, v, positions, _ = row
    kept = draw.uniform(size=(K, S)) < 0.4
    new_k, new_v, thresholds = merging.d2o_merge(
        k, np.ones_like(v), kept, positions=positions, frequencies=FREQUENCIES
    )
    np.testing.assert_allclose(new_v, 1.0)  # the weights of a receiver sum to one
    _, cosines = merging.nearest_kept(k, kept, positions=positions)
    over = (cosines >= thresholds[:, None]).sum(1) / np.isfinite(cosines).sum(1)
    assert ((over > 0.2) & (over < 0.8)).all()
    np.testing.assert_array_equal(new_k[~kept], k[~kept])
    # One key before RoPE at two places: turned, it is the receiver's own.
    plain = draw.normal(size=(1, 1, D))
    places = np.array([[3, 9]])
    pair = turn(np.repeat(plain, 2, 1), places, FREQUENCIES)
    values = np.array([[[1.0] * D, [3.0] * D]])
    mask = np.array([[False, True]])
    merged, mixed, threshold = merging.d2o_merge(
        pair, values, mask, positions=places, frequencies=FREQUENCIES
    )
    np.testing.assert_allclose(merged[0, 1], pair[0, 1])
    own, given = np.e, np.exp(threshold[0])
    np.testing.assert_allclose(mixed[0, 1], (3 * own + given) / (own + given))
    later = merging.d2o_threshold(np.array([[0.2, 0.4]]), np.array([0.7]), alpha=0.25)
    np.testing.assert_allclose(later, [0.25 * 0.7 + 0.75 * 0.3])


def test_d2o_goes_by_positions(draw, row):
    _, k, v, positions, _ = row
    kept = draw.uniform(size=(K, S)) < 0.4
    want = merging.d2o_merge(k, v, kept, positions=positions, frequencies=FREQUENCIES)
    slots, moved, k2, v2, m2 = scattered(draw, positions, k, v, kept)
    mask = (m2 > 0) & (moved >= 0)
    got = merging.d2o_merge(k2, v2, mask, positions=moved, frequencies=FREQUENCIES)
    for n in range(K):
        np.testing.assert_allclose(got[0][n, slots[n]], want[0][n], atol=1e-12)
        np.testing.assert_allclose(got[1][n, slots[n]], want[1][n], atol=1e-12)
    for ours, theirs in zip(
        kept_positions(mask, moved), kept_positions(kept, positions), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
