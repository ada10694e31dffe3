"""Budgets for which all layers share: who gets how many, by numbers made up.

Against the references where there is no limit, by brute force where there is one.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax import scorers
from kvjax.budgets import AdaKVGlobal, Cake, Lava
from kvjax.budgets._sharing import apportioned, best_of_all, weights_of
from kvjax.compress.observe import remember
from kvjax.pallas_kernels.slots import attend_block, slot_mask
from tests.compress.samples import draw, layer_spec
from tests.reference import layer_budgets

FREE = 1e6
"""`most` that limits nothing."""
LAYERS, KV_HEADS, TOKENS = 5, 2, 40


APPORTION = jax.jit(apportioned)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32 - 1))
def test_highest_averages(seed):
    """Rows of all kinds beside each other: the reference, and exact sums."""
    rng = np.random.default_rng(seed)
    layers, rows = 6, 4
    preference = rng.gamma(rng.choice([0.1, 1.0, 9.0]), size=(layers, rows))
    preference *= rng.integers(0, 3, (layers, rows)) > 0  # some have none, or all
    preference = np.where(rng.random() < 0.2, np.round(preference), preference)
    preference = preference.astype(np.float32)
    most = rng.integers(0, 60, (layers, rows))
    total = rng.integers(0, most.sum(axis=0) + 4)
    with np.errstate(divide="ignore"):
        weights = weights_of(jnp.asarray(np.log(preference.astype("f8")), "f4"))
    got = np.asarray(APPORTION(weights, jnp.asarray(total, "i4"), jnp.asarray(most)))
    np.testing.assert_array_equal(got.sum(axis=0), np.minimum(total, most.sum(axis=0)))
    for row in range(rows):
        given = np.asarray(weights, np.float64)[:, row], int(total[row])
        want = layer_budgets.highest_averages(*given, least=0, most=most[:, row])
        mine, weight = got[:, row], given[0]
        last = np.where(mine > 0, weight / np.maximum(mine - 0.5, 0.5), np.inf).min()
        after = np.where(mine < most[:, row], weight / (mine + 0.5), 0.0).max()
        assert last >= after * (1 - 1e-5)  # nobody else's next slot is worth more
        if last > after * (1 + 1e-5):  # and where floats can tell, it is the only way
            np.testing.assert_array_equal(mine, want)


def test_long_rows_are_divided_exactly():
    """Where floats no longer tell one slot from the next, sums are still exact."""
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.uniform(1e-9, 1, (13, 3)), jnp.float32)
    most = jnp.full((13, 3), 2**27, jnp.int32)
    total = jnp.asarray([2**30 + 7, 2**26 + 1, 13 * 2**27], jnp.int32)
    got = np.asarray(APPORTION(weights, total, most), np.int64)
    np.testing.assert_array_equal(got.sum(axis=0), total)
    assert (got >= 0).all() and (got <= 2**27).all()
    share = np.asarray(weights[:, 1] / weights[:, 1].sum(), np.float64)
    np.testing.assert_allclose(got[:, 1], share * float(total[1]), rtol=1e-4, atol=2)


def by_hand(scores, total: int, most, sure) -> np.ndarray:
    """Slots of heads, `[H]`, token by token from the best on."""
    (heads, tokens), counts = scores.shape, np.zeros(len(scores), int)
    ranks = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1)
    order = [
        (ranks[h, t] >= sure[h], -scores[h, t], h, ranks[h, t])
        for h in range(heads)
        for t in range(tokens)
        if scores[h, t] > -np.inf and ranks[h, t] < most[h]
    ]
    for _, _, head, _ in sorted(order)[:total]:
        counts[head] += 1
    return counts


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_best_of_all_heads(seed):
    """Equal scores, protected and forbidden tokens, heads that are full."""
    rng = np.random.default_rng(seed)
    rows, heads, tokens = 3, 4, 12
    scores = rng.integers(0, rng.choice([2, 5, 1000]), (rows, heads, tokens)) / 8
    scores = np.where(rng.random(scores.shape) < 0.1, np.inf, scores)
    scores = np.where(rng.random(scores.shape) < 0.2, -np.inf, scores)
    most = rng.integers(1, tokens + 1, (rows, heads))
    sure = rng.integers(0, 4, (rows, heads))
    total = rng.integers(0, heads * tokens + 1, rows)
    numbers = [jnp.asarray(x, jnp.int32) for x in (total, most, sure)]
    got = jax.jit(best_of_all)(jnp.asarray(scores, jnp.float32), *numbers)
    for row in range(rows):
        safe = np.minimum(sure[row], most[row])
        if safe.sum() <= total[row]:  # budgets see to it
            want = by_hand(scores[row], int(total[row]), most[row], safe)
            np.testing.assert_array_equal(got[row], want)


# Budgets against the references


def random_scores(seed: int, window: int) -> np.ndarray:
    """`[L, 1, K, S]`, each layer and head of its own scale, the last tokens safe."""
    rng = np.random.default_rng(seed)
    scores = rng.gamma(0.3, size=(LAYERS, 1, KV_HEADS, TOKENS))
    scores *= rng.gamma(1, size=(LAYERS, 1, KV_HEADS, 1))
    scores[..., TOKENS - window :] = np.inf
    return scores.astype(np.float32)


def allotted(budget, scores, looks, mean: int) -> np.ndarray:
    """Slots of each head of one row, `[L, K]`."""
    layers = scores.shape[0]
    slots = jnp.full((layers, 1), mean, jnp.int32)
    specs = (layer_spec(4, KV_HEADS, 16),) * layers
    lengths = jnp.full((1,), scores.shape[-1], jnp.int32)
    run = jax.jit(functools.partial(budget.allot, specs=specs))
    return np.asarray(run(jnp.asarray(scores), looks, slots, lengths))[:, 0]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("window", [0, 4])
def test_heads_of_all_layers(seed, window):
    scores, mean = random_scores(seed, window), 11
    budget = AdaKVGlobal(keep=0.3, most=FREE, safeguard=0.25)
    got = allotted(budget, scores, (), mean)
    positions = np.broadcast_to(np.arange(TOKENS), (LAYERS, KV_HEADS, TOKENS))
    mask = layer_budgets.adakv_global(scores[:, 0], positions, mean, safeguard=0.25)
    np.testing.assert_array_equal(got, mask.sum(axis=-1))
    assert got.sum() == LAYERS * KV_HEADS * mean


@pytest.mark.parametrize("seed", range(4))
def test_heads_of_all_layers_have_a_limit(seed):
    scores, mean = random_scores(seed, 3), 11
    got = allotted(AdaKVGlobal(keep=0.3, most=1.5), scores, (), mean)
    flat = scores.reshape(LAYERS * KV_HEADS, TOKENS)
    heads = np.ones(len(flat), int)
    want = by_hand(flat, LAYERS * KV_HEADS * mean, 16 * heads, 2 * heads)
    np.testing.assert_array_equal(got.reshape(-1), want)
    assert got.max() == 16 and got.sum() == LAYERS * KV_HEADS * mean


def cascade(scores, preference, mean: int, *, window: int, most: int, flat: bool):
    """Masks and budgets of the papers' cascade; these do not count the window."""
    positions = np.broadcast_to(np.arange(TOKENS), (LAYERS, KV_HEADS, TOKENS))
    masks, budgets, peak = layer_budgets.layers_in_cascade(
        scores[:, 0],
        positions,
        preference,
        (mean - window) * LAYERS,
        least=0,
        most=most - window,
        flat=flat,
        rule=layer_budgets.highest_averages,
    )
    assert peak < LAYERS * KV_HEADS * TOKENS  # which is what ours holds for a while
    return np.array(masks), budgets


@pytest.mark.parametrize("most", [FREE, 1.5])
@pytest.mark.parametrize("seed", range(4))
def test_cake_is_its_cascade(seed, most):
    scores, mean, window = random_scores(seed, 4), 11, 4
    preference = np.random.default_rng(seed).gamma(1, size=LAYERS).astype(np.float32)
    budget = Cake(keep=0.3, most=most, window=window)
    looks = jnp.log(jnp.asarray(preference))[:, None]
    got = allotted(budget, scores, looks, mean)
    limit = int(min(most * mean, TOKENS))
    how = {"window": window, "most": limit, "flat": False}
    masks, budgets = cascade(scores, preference, mean, **how)
    np.testing.assert_array_equal(got, np.stack([budgets + window] * KV_HEADS, -1))
    np.testing.assert_array_equal(got, masks.sum(axis=-1))
    assert got.sum() == LAYERS * KV_HEADS * mean and got.max() <= limit


@pytest.mark.parametrize("seed", range(6))
def test_lava_is_its_cascade(seed):
    scores, mean, window = random_scores(seed, 4), 11, 4
    got = allotted(Lava(keep=0.3, most=FREE), scores, (), mean)
    preference = np.array([layer_budgets.lava_preference(x[0]) for x in scores])
    how = {"window": window, "most": TOKENS, "flat": True}
    masks, _ = cascade(scores, preference, mean, **how)
    np.testing.assert_array_equal(got, masks.sum(axis=-1))
    assert got.sum() == LAYERS * KV_HEADS * mean


@pytest.mark.parametrize("seed", range(4))
def test_lava_has_a_limit(seed):
    scores, mean, window = random_scores(seed, 4), 11, 4
    got = allotted(Lava(keep=0.3, most=1.25), scores, (), mean)
    preference = np.array([layer_budgets.lava_preference(x[0]) for x in scores])
    layers = window + layer_budgets.highest_averages(
        preference, (mean - window) * LAYERS, least=0, most=13 - window
    )
    for layer, slots in enumerate(layers):
        limits = [np.full(KV_HEADS, n) for n in (13, 0)]
        want = by_hand(scores[layer, 0], KV_HEADS * int(slots), *limits)
        np.testing.assert_array_equal(got[layer], want)
    assert got.max() == 13 and got.sum() == LAYERS * KV_HEADS * mean


@pytest.mark.parametrize(
    "fields", [{}, {"window": 48}, {"softcap": 5.0}], ids=["full", "window", "softcap"]
)
@pytest.mark.parametrize("taus", [(1.0, 1.0), (1.6, 0.4)])
def test_cake_preference(fields, taus):
    """Of every row, and a row that is not longer than the window weighs nothing."""
    lengths, window = (96, 61, 12), 16
    sample = draw(7, layer_spec(4, 2, 16, **fields), lengths, width=104)
    budget = Cake(keep=0.5, window=window, tau1=taus[0], tau2=taus[1])
    seen = jnp.asarray(lengths, jnp.int32)
    got = np.asarray(budget.look(sample.inputs, sample.inputs.held(seen)))
    assert got[2] == -np.inf
    for row, n in enumerate(lengths[:2]):
        q, k, _ = sample.row(row)
        index = np.arange(n)
        want, *_ = layer_budgets.cake_preference(
            q,
            k,
            positions=np.tile(index, (2, 1)),
            q_positions=index,
            sliding=fields.get("window"),
            tau1=taus[0],
            tau2=taus[1],
            window=window,
            softcap=fields.get("softcap"),
        )
        # Sums over query heads in place of means.
        want = np.log(want) + np.log(4) * (1 / taus[0] + 1 / taus[1])
        np.testing.assert_allclose(got[row], want, rtol=1e-4)


def test_cake_in_chunks_of_queries(monkeypatch):
    """The padding of the last chunk is none of the queries that vary."""
    sample = draw(9, layer_spec(4, 2, 16), (60, 41))
    held = sample.inputs.held(jnp.asarray(sample.lengths, jnp.int32))
    score, budget = scorers.Cake(window=16), Cake(keep=0.5, window=16)

    def found():
        @jax.jit
        def run(inputs, held):
            memory = remember(score, None, inputs, held)
            scores = score.score(memory, held, jnp.asarray([20, 20]))
            return scores, budget.look(inputs, held)

        scores, look = run(sample.inputs, held)
        return np.asarray(scores)[np.asarray(held.live)], look

    whole = found()
    monkeypatch.setattr("kvjax.scorers.base.query_chunk", lambda *_: 5)
    for ours, theirs in zip(found(), whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("sliding", [None, 48])
def test_a_prefix_is_seen_and_not_counted(sliding):
    """Tokens in front that the layer does not hold have their weight, and no slots."""
    lengths, cut, window = (96, 90), 40, 16
    sample = draw(8, layer_spec(4, 2, 16, window=sliding), lengths)
    whole, seen = sample.inputs, jnp.asarray(lengths, jnp.int32)
    index = jnp.broadcast_to(jnp.arange(cut, 96), (2, 96 - cut))
    behind = whole.taken(index, index < seen[:, None])
    at = jnp.broadcast_to(jnp.arange(cut), (2, 2, cut))
    front = (behind.q, whole.k[:, :, :cut], whole.v[:, :, :cut])
    mask = slot_mask(behind.positions, at, sliding)
    past = attend_block(*front, mask, scale=whole.spec.scale)
    behind = dataclasses.replace(behind, elsewhere=past.lse)
    score, counts = scorers.Cake(window=window, kernel=1), jnp.asarray([20, 20])

    @jax.jit
    def scores(inputs):
        held = inputs.held(seen)
        memory = remember(score, None, inputs, held)
        return score.score(memory, held, counts)

    look = Cake(keep=0.5, window=window).look(behind, behind.held(seen))
    ours, theirs = scores(behind), scores(whole)
    for row, n in enumerate(lengths):
        want = theirs[row, :, cut:n]
        np.testing.assert_allclose(ours[row, :, : n - cut], want, rtol=1e-4)
        (q, k, _), place = sample.row(row), np.arange(n)
        how = {"positions": np.tile(place, (2, 1)), "q_positions": place}
        weights, before = layer_budgets.window_attention(
            q, k, window=window, sliding=sliding, **how
        )
        a = weights[:, :, before[0] & (place >= cut)]
        entropy = -(a * np.log(np.where(a > 0, a, 1.0))).sum() / window
        spread = a.var(axis=1, ddof=1).sum()
        np.testing.assert_allclose(look[row], np.log(entropy * spread), rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        (AdaKVGlobal, {"safeguard": 1.5}, "safeguard` must be a number in"),
        (AdaKVGlobal, {"most": 0.5}, "most` must be a number >= 1"),
        (Cake, {"tau1": 0.0}, "tau1` must be a number > 0"),
        (Cake, {"window": 1}, "window` must be an integer"),
        (Lava, {"most": float("inf")}, "must be a finite number >= 1; got inf"),
    ],
)
def test_wrong_fields(kind, fields, says):
    with pytest.raises(ValueError, match=says):
        kind(keep=0.5, **fields)
