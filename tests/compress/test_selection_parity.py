"""Budgets, units and the choice of tokens against their references."""

import decimal
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvjax
from kvjax.budgets import AdaKV, Pyramid, Uniform
from kvjax.compress.select import choose, choose_flat, head_counts
from kvjax.exact import ceil_share
from kvjax.units import Chunk, Token
from tests import reference
from tests.compress.samples import layer_spec

LENGTHS = np.array([60, 47, 33], np.int32)
WIDTH, KV_HEADS = 64, 3


def layer_tables(budget, longest: int, layers: int) -> np.ndarray:
    """Slots per head `[L, longest + 1]`."""
    specs = (layer_spec(4, 2, 16, num_layers=layers),) * layers
    return budget.counts(np.arange(longest + 1), specs, slot_bytes=68.0)


@pytest.mark.parametrize(
    ("tokens", "keep", "slots"),
    [(1000, 0.07, 70), (10, 0.1, 1), (100, 0.29, 29), (3, 0.5, 2), (7, 1.0, 7)],
)
def test_ceil_share_examples(tokens, keep, slots):
    assert ceil_share(np.array([tokens]), keep) == [slots]


@settings(deadline=None)
@given(
    st.integers(0, 2_000_000),
    st.decimals("0.0001", "1", places=4).map(lambda x: x.normalize()),
)
def test_ceil_share_is_decimal_arithmetic_rounded_up(tokens, keep):
    exact = (tokens * keep).to_integral_value(decimal.ROUND_CEILING)
    assert ceil_share(np.array([tokens]), float(keep)) == [int(exact)]


PYRAMIDS = {
    "layers": st.integers(1, 40),
    "length": st.integers(1, 700),
    "percent": st.integers(1, 100),
    "beta": st.sampled_from([1, 1.5, 2, 2.5, 3, 7, 20, 64]),
    "window": st.sampled_from([1, 2, 8, 16, 64]),
}


@settings(max_examples=100, deadline=None)
@given(**PYRAMIDS)
def test_pyramid_layers_sum_to_the_budget(layers, length, percent, beta, window):
    budget = Pyramid(keep=percent / 100, beta=beta, window=window)
    table = layer_tables(budget, length, layers)
    mean = ceil_share(np.arange(length + 1), percent / 100)
    np.testing.assert_array_equal(table.sum(axis=0), layers * mean)
    assert (np.diff(table, axis=0) <= 0).all()
    assert (table <= np.arange(length + 1)).all()


@settings(max_examples=100, deadline=None)
@given(**PYRAMIDS)
def test_pyramid_follows_kvpress_up_to_rounding(layers, length, percent, beta, window):
    layers = max(layers, 2)  # kvpress gives a single layer the first layer's share
    budget = Pyramid(keep=percent / 100, beta=beta, window=window)
    ours = layer_tables(budget, length, layers)[:, length]
    mean = int(ceil_share(np.array(length), percent / 100))
    theirs = reference.pyramidkv_layer_budgets(
        length,
        Fraction(mean, length),  # type: ignore[arg-type]
        layers,
        window=window,
        beta=Fraction(beta),  # type: ignore[arg-type]
    )
    assert np.abs(ours - np.array(theirs)).max() <= 1


def test_pyramid_is_not_always_uniform():
    table = layer_tables(Pyramid(keep=0.25, beta=20, window=8), 1000, 4)[:, 1000]
    assert list(table) == [488, 329, 171, 12]


def random_scores(seed: int, protect: int = 0) -> np.ndarray:
    """Scores `[B, K, S]`: some protected at each row's end, `-inf` behind it."""
    scores = np.random.default_rng(seed).normal(size=(3, KV_HEADS, WIDTH))
    index = np.arange(WIDTH)
    ends = LENGTHS[:, None, None]
    scores = np.where(index >= ends - protect, np.inf, scores)
    return np.where(index < ends, scores, -np.inf).astype(np.float32)


def positions(index, live) -> list[list[np.ndarray]]:
    """Chosen positions by row and head."""
    pairs = zip(np.asarray(index), np.asarray(live), strict=True)
    return [
        [head[on] for head, on in zip(row, mask, strict=True)] for row, mask in pairs
    ]


@jax.jit
def chosen(priorities, counts):
    """The slots of every head, with room to spare."""
    return choose(priorities, counts, WIDTH + 4)


def kept_by(
    unit, scores: np.ndarray, counts: np.ndarray, protected: int = 0
) -> list[list[np.ndarray]]:
    """What a unit keeps of every row and head."""
    allowed, lengths = jnp.asarray(counts, jnp.int32), jnp.asarray(LENGTHS)
    priorities = unit.priorities(jnp.asarray(scores), lengths, allowed, protected)
    # A whole-chunk unit bounds itself, by `-inf`; its slots are then the limit.
    slots = unit.slots(counts, LENGTHS, protected)
    return positions(*chosen(priorities, jnp.asarray(slots, jnp.int32)))


@pytest.mark.parametrize("protect", [0, 5])
def test_tokens(protect):
    scores, counts = random_scores(0, protect), np.array([20, 11, 33])
    ours = kept_by(Token(), scores, counts)
    for row, n in enumerate(counts):
        theirs = reference.kept(scores[row, :, : LENGTHS[row]].astype(float), n)
        for mine, other in zip(ours[row], theirs, strict=True):
            np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("protect", [0, 5, 13])
@pytest.mark.parametrize("size", [5, 10, 20])
def test_whole_chunks_are_those_of_kvpress(size, protect):
    unit = Chunk(size=size, reduce="mean", share_heads=True, whole=True)
    for seed, counts in enumerate([[30, 15, 16], [9, 46, 7], [1, 47, 33]]):
        scores = random_scores(seed, protect)
        ours = kept_by(unit, scores, np.array(counts))
        for row, n in enumerate(counts):
            length = int(LENGTHS[row])
            theirs = reference.chunkkv_kept(
                scores[row, :, :length].astype(float),
                Fraction(n, length),  # type: ignore[arg-type]
                chunk=size,
            )
            for mine, other in zip(ours[row], theirs, strict=True):
                np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("size", [5, 10, 20])
def test_whole_chunks_never_drop_what_is_protected(size):
    """Nor where the last chunk is cut off, or chunks are rounded down below it."""
    unit = Chunk(size=size, reduce="mean", share_heads=True, whole=True)
    protect = 13
    for seed, counts in enumerate([[13, 46, 14], [20, 13, 33], [31, 17, 13]]):
        scores = random_scores(seed, protect)
        ours = kept_by(unit, scores, np.array(counts), protect)
        for row, n in enumerate(counts):
            length = int(LENGTHS[row])
            theirs = reference.chunkkv_kept(
                scores[row, :, :length].astype(float),
                Fraction(n, length),  # type: ignore[arg-type]
                chunk=size,
                protected=protect,
            )
            for mine, other in zip(ours[row], theirs, strict=True):
                np.testing.assert_array_equal(mine, other)
                assert np.isin(np.arange(length - protect, length), mine).all()


@pytest.mark.parametrize("tokens", [300, 301])
def test_the_window_of_chunkkv_stays(tokens):
    """Five chunks hold the window and three or four fit: the newest, and the rest."""
    c = kvjax.compression("chunkkv_kvpress", **{"evict.budget.keep": 0.25})
    assert c.evict is not None and c.evict.score.protected == 64
    lengths = jnp.asarray([tokens], jnp.int32)
    scores = np.random.default_rng(0).normal(size=(1, 2, 320)).astype(np.float32)
    index = np.arange(320)
    scores = np.where(index >= tokens - 64, np.inf, scores)
    scores = jnp.asarray(np.where(index < tokens, scores, -np.inf))
    specs = (layer_spec(4, 2, 16),)
    counts = c.evict.budget.counts(lengths, specs, 68.0)[0]
    unit, protected = c.evict.unit, c.evict.score.protected
    priorities = unit.priorities(scores, lengths, counts, protected)
    slots = unit.slots(counts, lengths, protected)
    most = unit.capacities(c.evict.budget, tokens, specs, 68.0, protected)
    assert int(slots[0]) <= most[0]
    for head in positions(*choose(priorities, slots, most[0]))[0]:
        assert np.isin(np.arange(tokens - 64, tokens), head).all()


def test_shared_chunks_are_the_same_where_heads_protect_different_tokens():
    scores = random_scores(1)
    scores[:, 0, 3] = scores[:, 1, 27] = np.inf  # as CriticalKV protects, per head
    unit = Chunk(size=10, reduce="mean", share_heads=True, whole=True)
    ours = kept_by(unit, scores, np.array([20, 20, 17]))
    for row in range(3):
        length = int(LENGTHS[row])
        live = scores[row, :, :length].astype(float)
        keep = Fraction([20, 20, 17][row], length)
        theirs = reference.chunkkv_kept(live, keep, chunk=10)  # type: ignore[arg-type]
        for mine, other in zip(ours[row], theirs, strict=True):
            np.testing.assert_array_equal(mine, other)


def paper_order(row: np.ndarray, size: int) -> np.ndarray:
    """Tokens best first: protected ones, then the chunks by their sum."""
    protected = np.flatnonzero(np.isposinf(row))
    finite = np.where(np.isposinf(row), 0.0, row)
    starts = np.arange(0, len(row), size)
    sums = np.array([finite[start : start + size].sum() for start in starts])
    ranked = starts[np.argsort(-sums, kind="stable")]
    runs = [np.arange(start, min(start + size, len(row))) for start in ranked]
    rest = np.concatenate(runs)
    return np.concatenate([protected, rest[~np.isin(rest, protected)]])


@pytest.mark.parametrize("protect", [0, 7])
@pytest.mark.parametrize("size", [4, 10])
def test_paper_chunks_meet_the_budget_exactly(size, protect):
    counts = np.array([23, 20, 8])
    scores = random_scores(2, protect)
    ours = kept_by(Chunk(size=size), scores, counts)
    for row, n in enumerate(counts):
        for head in range(KV_HEADS):
            live = scores[row, head, : LENGTHS[row]].astype(float)
            best = np.sort(paper_order(live, size)[:n])
            np.testing.assert_array_equal(ours[row][head], best)


@pytest.mark.parametrize("size", [4, 10])
def test_paper_chunks_are_those_of_the_paper(size):
    """Without a window the whole chunks agree; the paper leaves the rest unused."""
    scores, counts = random_scores(5), np.array([20, 20, 24])
    ours = kept_by(Chunk(size=size), scores, counts)
    for row, n in enumerate(counts):
        live = scores[row, :, : LENGTHS[row]].astype(float)
        theirs = reference.chunkkv_paper_kept(live, n, chunk=size, window=0)
        for mine, other in zip(ours[row], theirs, strict=True):
            assert len(mine) == n and np.isin(other, mine).all()
            if len(other) == n:
                np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("protect", [0, 4])
@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8, 1.0])
def test_head_wise_choice(alpha, protect):
    counts = np.array([25, 10, 33])
    scores = random_scores(7, protect)
    # Heads on different levels: without a safe part one would take all.
    scores[:, 1] += 2.0
    scores[:, 2] -= 2.0
    specs = (layer_spec(2 * KV_HEADS, KV_HEADS, 16),)
    shares = AdaKV(keep=0.5, safeguard=alpha).split(counts[None], LENGTHS, specs)
    sure, total = (jnp.asarray(x[0], jnp.int32) for x in shares)
    most, given = 40 * KV_HEADS, jnp.asarray(scores)
    flat = choose_flat(given, head_counts(given, sure, total, most), most)
    offsets = np.asarray(flat.offsets)
    for row, n in enumerate(counts):
        live = scores[row, :, : LENGTHS[row]].astype(float)
        theirs = reference.adakv_kept(live, n, alpha=alpha)
        assert offsets[row, -1] == n * KV_HEADS == np.asarray(flat.live)[row].sum()
        for head, other in enumerate(theirs):
            slots = slice(offsets[row, head], offsets[row, head + 1])
            np.testing.assert_array_equal(np.asarray(flat.index)[row, slots], other)
            assert (np.asarray(flat.head)[row, slots] == head).all()
            assert len(other) >= int(alpha * n)


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 100), st.integers(1, 12))
def test_uniform_and_head_wise_budgets_are_the_mean(length, percent, layers):
    for kind in (Uniform, AdaKV):
        table = layer_tables(kind(keep=percent / 100), length, layers)
        want = ceil_share(np.arange(length + 1), percent / 100)
        np.testing.assert_array_equal(table, np.tile(want, (layers, 1)))


@settings(deadline=None)
@given(st.integers(1, 100_000), st.integers(1, 6))
def test_byte_budgets_are_met(budget, layers):
    slot, heads = 68, 2
    if budget < slot * heads * layers:
        with pytest.raises(ValueError, match="less than one slot"):
            layer_tables(Uniform(bytes=budget), 50, layers)
        return
    table = layer_tables(Uniform(bytes=budget), 50, layers)
    used = table.sum(axis=0) * slot * heads
    assert (used <= budget).all()
    spare = budget - used
    assert ((spare < slot * heads * layers) | (table[0] == np.arange(51))).all()
