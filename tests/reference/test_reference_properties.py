"""The references that kvpress cannot check: worked examples and exact properties."""

import numpy as np
import pytest

from tests import reference
from tests.reference.codecs import quantise_group

H, K, S, D = 4, 2, 192, 8


@pytest.fixture
def qkv() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random queries `[H, S, D]`, keys and values `[K, S, D]`."""
    draw = np.random.default_rng(0)
    shapes = (H, S, D), (K, S, D), (K, S, D)
    q, k, v = (draw.normal(size=shape) for shape in shapes)
    return q, k, v


@pytest.fixture
def inv_freq() -> np.ndarray:
    """RoPE frequencies `[D/2]`."""
    return 10_000.0 ** -(np.arange(0, D, 2) / D)


def test_kept_ties_go_to_the_lower_position():
    scores = np.array([[1.0, 3.0, 1.0, np.inf, 1.0]])
    np.testing.assert_array_equal(reference.kept(scores, 4)[0], [0, 1, 2, 3])


def test_attention_is_causal_and_normalised(qkv):
    weights = reference.attention(qkv[0], qkv[1])
    np.testing.assert_allclose(weights.sum(-1), 1.0)
    assert (weights[:, np.triu_indices(S, 1)[0], np.triu_indices(S, 1)[1]] == 0).all()


def test_rotation_keeps_relative_products(qkv, inv_freq):
    q, k = qkv[0][:1, :2], qkv[1][:1, :2]
    near = reference.rotate(q, np.array([5, 5]), inv_freq) @ (
        reference.rotate(k, np.array([3, 3]), inv_freq)[0].T
    )
    far = reference.rotate(q, np.array([105, 105]), inv_freq) @ (
        reference.rotate(k, np.array([103, 103]), inv_freq)[0].T
    )
    np.testing.assert_allclose(near, far)
    back = reference.rotate(
        reference.rotate(k, np.array([9, 4]), inv_freq),
        np.array([9, 4]),
        inv_freq,
        inverse=True,
    )
    np.testing.assert_allclose(back, k)


def test_h2o_scores_protect_recent(qkv):
    scores = reference.score_h2o(*qkv, recent=5)
    assert np.isinf(scores[:, -5:]).all()
    plain = reference.score_h2o(*qkv)
    np.testing.assert_allclose(plain.sum(), H * S)  # each row of weights sums to one


def test_adakv_shares_slots_and_keeps_a_safe_part():
    scores = np.stack([np.arange(10.0), 100 + np.arange(10.0)])
    free = reference.adakv_kept(scores, 5, alpha=0.0)
    assert [len(row) for row in free] == [0, 10]
    safe = reference.adakv_kept(scores, 5, alpha=0.4)
    np.testing.assert_array_equal(safe[0], [8, 9])
    np.testing.assert_array_equal(safe[1], np.arange(2, 10))


def test_pyramid_budgets_sum_to_uniform():
    assert reference.pyramidkv_layer_budgets(320, 0.5, 4) == [256, 192, 128, 64]
    # min < window: the same budget everywhere
    assert reference.pyramidkv_layer_budgets(320, 0.25, 4) == [80] * 4


def test_chunkkv_paper_example():
    scores = np.zeros((1, 12))
    scores[0, 3:6] = 1.0
    scores[0, 6:9] = 2.0
    # chunks of 3: the best two are tokens 3..8; the last two of them make room
    got = reference.chunkkv_paper_kept(scores, 6, chunk=3, window=2)
    np.testing.assert_array_equal(got[0], [3, 4, 5, 6, 10, 11])


def test_chunkkv_keeps_whole_chunks_for_all_heads():
    scores = np.zeros((2, 50))
    scores[0, 45] = 1.0  # the remainder of ten tokens is a chunk of its own
    first, second = reference.chunkkv_kept(scores, 0.5, chunk=20)
    np.testing.assert_array_equal(first, np.arange(40, 50))
    np.testing.assert_array_equal(first, second)


def test_criticalkv_prefers_values_that_reach_the_output():
    base = np.array([[0.4, 0.3, 0.2, 0.1]])
    v = np.array([[[1.0], [1.0], [1.0], [5.0]]])
    w_o = np.array([[[2.0, -1.0]], [[1.0, 1.0]]])  # L1 norms 3 and 2, mean 2.5
    scores = reference.score_criticalkv(base, v, w_o, 2, epsilon=0.1)
    np.testing.assert_allclose(scores[0], [np.inf, 1.0, 0.75, 2.5])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_kivi_error_is_half_a_step(qkv, bits):
    _, k, v = qkv
    back = reference.kivi_keys(k, bits=bits, group=32)
    for start in range(0, S, 32):
        block = k[:, start : start + 32]
        step = (block.max(1) - block.min(1)) / (2**bits - 1)
        error = np.abs(back[:, start : start + 32] - block).max(1)
        assert (error <= step / 2 + 1e-12).all()
    back = reference.kivi_values(v, bits=bits, group=4)
    blocks, errors = v.reshape(K, S, 2, 4), np.abs(back - v).reshape(K, S, 2, 4)
    step = (blocks.max(-1) - blocks.min(-1)) / (2**bits - 1)
    assert (errors.max(-1) <= step / 2 + 1e-12).all()


def test_kivi_residual_is_exact(qkv):
    _, k, v = qkv
    back = reference.kivi_keys(k[:, :150], bits=2, group=16, residual=64)
    np.testing.assert_array_equal(back[:, 128:], k[:, 128:150])
    assert (back[:, :128] != k[:, :128]).any()
    back = reference.kivi_values(v, bits=2, group=4, residual=7)
    np.testing.assert_array_equal(back[:, -7:], v[:, -7:])
    assert (back[:, -8] != v[:, -8]).any()


def test_quantise_group_examples():
    codes, scale, zero = quantise_group(np.array([-1.0, 0.0, 0.4, 2.0]), 2)
    np.testing.assert_array_equal(codes, [0, 1, 1, 3])
    assert (scale, zero) == (1.0, -1.0)
    codes, scale, zero = quantise_group(np.full(3, 7.0), 2)
    np.testing.assert_array_equal(codes * scale + zero, [7.0, 7.0, 7.0])


def test_int8_error_is_half_a_step(qkv):
    codes, scales, back = reference.int8_per_token(qkv[1])
    assert np.abs(codes).max() == 127
    assert (np.abs(back - qkv[1]) <= scales[..., None] / 2 + 1e-12).all()
    assert not reference.int8_per_token(np.zeros((1, 2, 4)))[2].any()


def test_low_rank_error_is_the_singular_tail(qkv, inv_freq):
    k, positions = qkv[1], np.arange(S)
    full = reference.low_rank_keys(k, inv_freq=inv_freq, rank=K * D)
    np.testing.assert_allclose(full, k, atol=1e-12)
    back = reference.low_rank_keys(k, inv_freq=inv_freq, rank=5)
    plain = reference.rotate(k, positions, inv_freq, inverse=True)
    wide = plain.transpose(1, 0, 2).reshape(S, -1)
    tail = np.linalg.svd(wide, compute_uv=False)[5:]
    np.testing.assert_allclose(((back - k) ** 2).sum(), (tail**2).sum())


def test_quest_bounds_hold_and_select(qkv):
    q, k = qkv[0][:, -1], qkv[1][:, :150]
    bounds = reference.quest_bounds(q, k)
    assert bounds.shape == (H, 10)
    for h in range(H):
        products = k[h // 2] @ q[h]
        for p in range(10):
            assert bounds[h, p] >= products[p * 16 : p * 16 + 16].max() - 1e-12
    pages = reference.quest_pages(bounds, 3)
    assert all(len(row) == 3 and row[-1] == 9 for row in pages)
    mask = reference.page_mask(pages, 150)
    assert (mask.sum(1) == 2 * 16 + 6).all()


def test_vertical_slash_counts(qkv):
    q, k, _ = qkv
    options = {"forced_verticals": 2, "forced_slashes": 3}
    mask = reference.vertical_slash_mask(q, k, vertical=40, slash=60, **options)
    row, column = np.indices((S, S))
    assert not mask[:, column > row].any()
    assert mask[:, (column < 2) & (column <= row)].all()
    near = (row - column >= 0) & (row - column < 3)
    assert mask[:, near].all()
    for h in range(H):
        full_columns = [j for j in range(S) if mask[h, j:, j].all()]
        full_offsets = [o for o in range(S) if np.diagonal(mask[h], -o).all()]
        assert len(full_columns) >= 40
        assert len(full_offsets) >= 60
    everything = reference.vertical_slash_mask(q, k, vertical=S, slash=50)
    np.testing.assert_array_equal(everything[0], np.tri(S, dtype=bool))


def test_attend_kept_is_attention_over_fewer_tokens(qkv):
    q, k, v = qkv
    kept = [np.array([0, 3, 50]), np.array([7, 8])]
    out = reference.attend_kept(q[:, -1:], k, v, kept)
    for h in range(H):
        mine = kept[h // 2]
        logits = k[h // 2, mine] @ q[h, -1] / np.sqrt(D)
        weights = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(out[h, 0], weights @ v[h // 2, mine])


def test_decoupled_brings_the_mean_of_dropped_values():
    q, k = np.zeros((1, 1, 1)), np.zeros((1, 4, 1))
    v = np.array([[[1.0], [2.0], [4.0], [100.0]]])
    keys, values = [np.array([0, 1, 2])], [np.array([0])]
    out = reference.attend_decoupled(q, k, v, keys, values)
    np.testing.assert_allclose(out[0, 0, 0], (1 + 3 + 3) / 3)
    same = reference.attend_decoupled(q, k, v, keys, keys)
    np.testing.assert_allclose(same, reference.attend_kept(q, k, v, keys))


def test_h2o_without_eviction_is_full_attention(qkv):
    q, k, v = (x[:, :40] for x in qkv)
    trace = reference.h2o_decode(q, k, v, prompt=30, heavy=40, recent=1)
    causal = np.tile(np.tri(40, dtype=bool)[30:], (H, 1, 1))
    np.testing.assert_allclose(trace.outputs, reference.attend(q[:, 30:], k, v, causal))
    np.testing.assert_allclose(trace.scores[-1], reference.score_h2o(q, k, v))


def test_h2o_evicts_one_token_per_step(qkv):
    q, k, v = (x[:, :60] for x in qkv)
    trace = reference.h2o_decode(q, k, v, prompt=40, heavy=6, recent=4)
    assert len(trace.kept) == 21
    for step, heads in enumerate(trace.kept):
        newest = np.arange(36 + step, 40 + step)
        for head, positions in enumerate(heads):
            assert len(positions) == 10
            np.testing.assert_array_equal(positions[-4:], newest)
            if step:  # what is gone never comes back
                before = np.append(trace.kept[step - 1][head], 39 + step)
                assert len(np.setdiff1d(before, positions)) == 1
                assert np.isin(positions, before).all()
