"""References that work on held tokens: worked examples and exact properties."""

import numpy as np
import pytest

from tests.reference import layer_budgets as budgets
from tests.reference import merging, probes, rkv, think, triattention, turboquant
from tests.reference.base import attention, softmax
from tests.reference.held import attention_to_held, kept_positions, pool, turn

H, K, S, D, FREE = 4, 2, 40, 8, 5
FREQUENCIES = 10_000.0 ** -(np.arange(0, D, 2) / D)


@pytest.fixture
def draw() -> np.random.Generator:
    """A seeded generator."""
    return np.random.default_rng(0)


@pytest.fixture
def row(draw):
    """`q` of all positions, `k`, `v` of all, with positions and query positions."""
    shapes = (H, S, D), (K, S, D), (K, S, D)
    q, k, v = (draw.normal(size=shape) for shape in shapes)
    return q, k, v, np.tile(np.arange(S), (K, 1)), np.arange(S)


def scattered(draw, positions, *arrays):
    """The same tokens in other slots, other ones in each head, with free slots."""
    slots = [draw.permutation(S + FREE)[:S] for _ in range(K)]
    moved = [np.full((K, S + FREE), -1)]
    moved += [draw.normal(size=(K, S + FREE, *x.shape[2:])) for x in arrays]
    for new, old in zip(moved, (positions, *arrays), strict=True):
        for n in range(K):
            new[n, slots[n]] = old[n]
    return slots, *moved


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


def test_think_example():
    q = np.array([[[9.0, 9.0], [1.0, 2.0]], [[9.0, 9.0], [3.0, 0.0]]])
    k = np.array([[[1.0, 1.0], [1.0, 3.0], [50.0, 50.0]]])
    scores = think.think_channel_scores(
        q,
        k,
        positions=np.array([[0, 1, -1]]),
        q_positions=np.array([0, 1]),
        window=1,
    )
    np.testing.assert_allclose(scores, [[5.0 * 1.0, 2.0 * 5.0]])
    kept = think.think_kept_channels(np.array([[1.0, 1.0, 1.0, 2.0]]), 0.7)
    np.testing.assert_array_equal(kept, [[True, False, False, True]])
    np.testing.assert_array_equal(think.think_keys(np.ones((1, 1, 4)), kept)[0], kept)


def test_levels_are_the_means_of_their_cells():
    for width, bits in ((4, 2), (16, 3), (128, 4), (256, 1)):
        levels = turboquant.lloyd_max_levels(width, bits)
        np.testing.assert_array_equal(levels, -levels[::-1])
        t = np.linspace(-1, 1, 400_001)
        density = (1 - t * t) ** ((width - 3) / 2)
        cell = np.searchsorted((levels[1:] + levels[:-1]) / 2, t)
        mass = np.bincount(cell, density)
        means = np.bincount(cell, density * t) / mass
        np.testing.assert_allclose(means, levels, atol=2e-5)
    # Towards many dimensions: the levels of a normal variable (Max, 1960).
    normal = turboquant.lloyd_max_levels(1024, 2) * 32
    np.testing.assert_allclose(normal[2:], [0.4528, 1.510], atol=2e-3)


@pytest.mark.parametrize("bits, error", [(4, 0.0093), (3, 0.0340), (2, 0.1160)])
def test_rotated_codec(draw, bits, error):
    width = 128
    signs = draw.choice([-1.0, 1.0], width)
    x = draw.normal(size=(300, width)) * draw.gamma(1, size=(300, 1))
    x[:, 3] *= 30  # an outlier channel, which the rotation spreads
    x[7] = 0
    turned = turboquant.rotate_in(x, signs)
    np.testing.assert_allclose(turboquant.rotate_out(turned, signs), x, atol=1e-12)
    codes, norms = turboquant.encode(x, signs, bits=bits)
    assert codes.min() >= 0 and codes.max() < 2**bits
    back = turboquant.decode(codes, norms, signs, bits=bits)
    np.testing.assert_allclose(np.linalg.norm(back, axis=1), norms)
    assert not back[7].any()
    moved = ((back - x) ** 2).sum(1)[norms > 0] / norms[norms > 0] ** 2
    assert 0.7 * error < moved.mean() < 1.5 * error
    packed = turboquant.pack(codes[0], bits)
    assert packed.nbytes * 8 + 16 == turboquant.bits_per_vector(width, bits)
    np.testing.assert_array_equal(turboquant.unpack(packed, bits), codes[0])


def test_hadamard_is_its_own_inverse():
    matrix = turboquant.hadamard(8)
    np.testing.assert_allclose(matrix @ matrix, np.eye(8), atol=1e-15)
    np.testing.assert_array_equal(
        np.sign(turboquant.hadamard(4)),
        [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]],
    )


RULES = {
    "largest_remainder": budgets.largest_remainder,
    "highest_averages": budgets.highest_averages,
}


@pytest.mark.parametrize("rule", RULES)
def test_budgets_sum_and_stay_in_bounds(draw, rule):
    for _ in range(200):
        layers, least = draw.integers(1, 9), draw.integers(0, 4)
        most = draw.integers(4, 40, layers)
        total = int(draw.integers(least * layers, most.sum() + 3))
        preference = draw.gamma(1, size=layers) * draw.integers(0, 2, layers)
        got = RULES[rule](preference, total, least=least, most=most)
        assert got.sum() == min(total, most.sum())
        assert (got >= least).all() and (got <= most).all()
        exact = budgets.shares(preference, total, least=least, most=most)
        assert np.abs(got - exact).max() < (1.0 if rule == "largest_remainder" else 2.0)


def test_budget_examples():
    by_rest = budgets.largest_remainder(np.array([3.0, 2.0, 2.0]), 8, least=0, most=9)
    np.testing.assert_array_equal(by_rest, [4, 2, 2])
    # The first layer is full at 5; the others share what is left as 2 to 1.
    full = budgets.largest_remainder(
        np.array([9.0, 2.0, 1.0]), 14, least=1, most=np.array([5, 20, 20])
    )
    np.testing.assert_array_equal(full, [5, 6, 3])
    # A third layer comes and the first one gets more, which a cascade cannot give.
    two, three = np.array([7.0, 12.0]), np.array([7.0, 12.0, 1.0])
    before = budgets.largest_remainder(two, 4, least=0, most=9)
    after = budgets.largest_remainder(three, 4, least=0, most=9)
    assert (before.tolist(), after.tolist()) == ([1, 3], [2, 2, 0])
    before = budgets.highest_averages(two, 4, least=0, most=9)
    after = budgets.highest_averages(three, 4, least=0, most=9)
    assert (before.tolist(), after.tolist()) == ([1, 3], [1, 3, 0])


def test_cascade_is_one_shot(draw):
    for trial in range(40):
        layers, flat = int(draw.integers(2, 7)), trial % 2 == 0
        scores = draw.normal(size=(layers, K, S))
        scores[:, :, -4:] = np.inf
        positions = np.tile(np.arange(S), (layers, K, 1))
        arguments = (scores, positions, draw.gamma(1, size=layers), 12 * layers)
        options = {"least": 1, "most": S - 4, "flat": flat}
        rule = budgets.highest_averages
        once, want = budgets.layers_at_once(*arguments, rule=rule, **options)
        slowly, got, peak = budgets.layers_in_cascade(*arguments, rule=rule, **options)
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(np.array(slowly), np.array(once))
        assert np.sum(once) == K * (12 + 4) * layers
        assert peak <= K * (12 + 4) * layers + K * S


def test_cake_preference_example(row):
    q, k, _, positions, places = row
    still = np.zeros_like(q)  # every query looks at all that it sees
    preference, entropy, variance = budgets.cake_preference(
        still, k, positions=positions, q_positions=places, window=4
    )
    lengths = np.arange(S - 3, S + 1)
    np.testing.assert_allclose(
        entropy, np.mean((S - 4) / lengths * np.log(lengths)), rtol=1e-12
    )
    np.testing.assert_allclose(variance, (S - 4) * np.var(1 / lengths, ddof=1))
    assert np.isclose(preference, entropy * variance)
    two = budgets.cake_preference(
        q, k, positions=positions, q_positions=places, window=4, tau1=2.0, tau2=0.5
    )
    np.testing.assert_allclose(two[0], two[1] ** 0.5 * two[2] ** 2)


def test_lava_preference_is_one_for_even_scores():
    scores = np.ones((2, 6))
    scores[:, -1] = np.inf
    assert np.isclose(budgets.lava_preference(scores), 1.0)
    scores[:, :5] = 1e-12
    scores[0, 2] = 1.0
    assert budgets.lava_preference(scores) < 1e-8


def test_adakv_global_sums_exactly_and_leaves_no_head_empty(draw):
    for _ in range(20):
        scores = draw.normal(size=(3, K, S)) * draw.gamma(0.3, size=(3, K, 1))
        scores[1] += 5
        scores[..., 7] = np.inf
        positions = np.tile(np.arange(S), (3, K, 1))
        positions[0, 1, 20:] = -1
        mean = int(draw.integers(1, 30))
        kept = budgets.adakv_global(scores, positions, mean)
        assert kept.sum() == 3 * K * mean and not kept[positions < 0].any()
        assert kept.sum(-1).min() >= max(1, int(0.2 * mean))
        assert kept[..., 7].all()
    backwards = np.arange(5)[None, None, ::-1]
    plain = budgets.adakv_global(np.zeros((1, 1, 5)), backwards, 2)
    np.testing.assert_array_equal(plain[0, 0], [False, False, False, True, True])


def make_transformer(draw, layers: int, tied: bool) -> probes.Transformer:
    """A random one: 11 tokens, width 12, 4 query and 2 KV heads."""
    wide = {"embed": (11, 12), "norm": (12,)} | ({} if tied else {"head": (12, 11)})
    for n in range(layers):
        wide |= {f"{n}/attn_norm": (12,), f"{n}/mlp_norm": (12,), f"{n}/q": (12, H, D)}
        wide |= {f"{n}/k": (12, K, D), f"{n}/v": (12, K, D), f"{n}/o": (H, D, 12)}
        wide |= {f"{n}/gate": (12, 9), f"{n}/up": (12, 9), f"{n}/down": (9, 12)}
    weights = {name: 0.5 * draw.normal(size=shape) for name, shape in wide.items()}
    return probes.Transformer(weights, FREQUENCIES)


def test_gates_of_one_and_zero(draw):
    model, tokens = make_transformer(draw, 1, tied=True), draw.integers(0, 11, 14)
    ones = np.ones((1, K, 9))
    np.testing.assert_array_equal(model.forward(tokens, ones), model.forward(tokens))
    ones[0, :, 4] = 0
    # In one layer a token that is absent is one that is taken out, positions kept.
    w, keep = model.weights, np.delete(np.arange(14), 4)
    x = w["embed"][tokens]
    normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w["0/attn_norm"]
    q, k, v = (np.einsum("te,ehd->htd", normed, w[f"0/{n}"]) for n in "qkv")
    q, k = (turn(y, np.arange(14)[None], FREQUENCIES) for y in (q, k))
    mixed = np.zeros(12)
    for h in range(H):
        share = softmax(k[h // 2, keep] @ q[h, -1] / np.sqrt(D))
        mixed += share @ v[h // 2, keep] @ w["0/o"][h]
    y = x[-1] + mixed
    y = y + model._mlp(model._norm(y, "0/mlp_norm"), 0)
    want = model._norm(y, "norm") @ w["embed"].T
    np.testing.assert_allclose(model.forward(tokens, ones)[-1], want, atol=1e-12)
    changed = (model.forward(tokens, ones) != model.forward(tokens)).any(-1)
    assert not changed[:9].any() and changed[9:].all()


def test_slopes_are_those_of_the_likelihood(draw):
    model, tokens = make_transformer(draw, 2, tied=False), draw.integers(0, 11, 13)
    gates, way = draw.uniform(size=(2, K, 7)), draw.normal(size=(2, K, 7))
    slopes = probes.gate_slopes(model, tokens, gates)
    ends = [
        probes.mean_nll(model, tokens, 7, gates + x * way, from_prompt=True)
        for x in (1e-5, -1e-5)
    ]
    np.testing.assert_allclose((slopes * way).sum(), (ends[0] - ends[1]) / 2e-5, 1e-5)
    # Along one gate the slopes add up to what removing the token costs.
    nodes, weights = np.polynomial.legendre.leggauss(12)
    ends, total, gates = [], 0.0, np.ones((2, K, 7))
    for at in (0.0, 1.0):
        gates[1, 0, 3] = at
        ends.append(probes.mean_nll(model, tokens, 7, gates))
    for node, weight in zip(nodes, weights, strict=True):
        gates[1, 0, 3] = (node + 1) / 2
        total += weight / 2 * probes.gate_slopes(model, tokens, gates)[1, 0, 3]
    np.testing.assert_allclose(total, ends[1] - ends[0], rtol=1e-6)
    rest = probes.gate_slopes(model, tokens, gates, from_prompt=False)
    whole = probes.gate_slopes(model, tokens, gates)
    np.testing.assert_allclose(rest * 5 / 6, whole, atol=1e-9)


def test_kvzip_sinks_and_chunks(draw, row):
    _, k, _, positions, _ = row
    q, replay = draw.normal(size=(H, 9, D)), draw.normal(size=(K, 9, D))
    arguments = {"positions": positions, "q_positions": 100 + np.arange(9)}
    parts = []
    for start, end in ((0, 16), (16, 32)):
        weights = probes.kvzip_attention(
            q, k, replay, start=start, end=end, **arguments
        )
        seen = np.flatnonzero(weights.any((0, 1)))
        sinks = [] if start == 0 else list(range(4))
        np.testing.assert_array_equal(seen, [*sinks, *range(start, end)])
        assert (weights.sum(-1) < 1).all()
        score = probes.kvzip_chunk_scores(
            q, k, replay, start=start, end=end, **arguments
        )
        parts.append([score])
    scores = probes.kvzip_scores(np.array(parts), positions[None])
    assert (scores[..., :4] == 1 + np.max(parts)).all()
    assert (scores[..., 32:] == 0).all() and (scores[..., 4:32] > 0).all()


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
