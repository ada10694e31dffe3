"""Budgets at the lengths of rows, against tables of every length."""

import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvjax
from kvjax import exact
from kvjax.budgets import AbstractBudget, AdaKV, Pyramid, RetrievalHeads, Uniform
from kvjax.cache import most_pages
from kvjax.compress.presets import compressions
from kvjax.reads import Quest
from kvjax.units import Chunk, Token
from tests.compress.samples import layer_spec

SLOT_BYTES = 68.0
FLOATS = [0.07, 0.1, 0.29, 1 / 3, 1e-05, 0.5, 0.999999, 1.0, 1e-17, 0.1 + 0.2]


def layers(n: int, kv_heads: int = 2, windows: tuple[int | None, ...] = (None,)):
    """Specs of a model; `windows` are repeated, and the heads' ranks shuffled."""
    ranks = np.random.default_rng(n).permutation(n * kv_heads).reshape(n, kv_heads)
    return tuple(
        layer_spec(
            2 * kv_heads,
            kv_heads,
            16,
            num_layers=n,
            window=windows[i % len(windows)],
            head_ranks=tuple(int(rank) for rank in ranks[i]),
        )
        for i in range(n)
    )


def ceil_share(n: np.ndarray, keep: float) -> np.ndarray:
    share = Fraction(repr(float(keep)))
    wide = n.astype(object) * share.numerator
    return np.array(-(-wide // share.denominator), np.int64)


def pyramid(mean, lengths, n: int, budget: Pyramid) -> np.ndarray:
    """Shares by their definition, in integers over one denominator."""
    if n == 1:
        return mean[None]
    beta = Fraction(repr(float(budget.beta)))
    p, q = beta.numerator, beta.denominator
    if p * q < 10**6:
        mean, lengths = mean.astype(np.int64), lengths.astype(np.int64)
    else:
        mean, lengths = mean.astype(object), lengths.astype(object)
    least, most = mean * q, 2 * mean * p - mean * q
    before = (lengths - budget.window) * p
    clipped = most >= before
    most = np.where(clipped, before, most)
    least = np.where(clipped, 2 * mean * p - most, least)
    valid = (lengths * p >= most) & (most >= least) & (least >= budget.window * p)
    depth = np.arange(n).astype(mean.dtype)[:, None]
    shares = most * (n - 1) - depth * (most - least)
    shares = np.where(valid, shares, mean * p * (n - 1))
    floor, rest = shares // (p * (n - 1)), shares % (p * (n - 1))
    missing = n * mean - floor.sum(axis=0)
    order = np.argsort(-rest, axis=0, kind="stable")
    return floor + (np.argsort(order, axis=0, kind="stable") < missing)


def heads_table(budget: RetrievalHeads, longest: int, specs) -> np.ndarray:
    """Slots of every head, `[L, N, K]`, head by head."""
    assert budget.keep is not None
    heads = sum(spec.num_kv_heads for spec in specs)
    whole = math.ceil(heads * Fraction(repr(float(budget.keep))))
    each = []
    for spec in specs:
        seen = np.minimum(np.arange(longest + 1), spec.window or longest)
        few = np.minimum(seen, budget.others)
        each.append([seen if rank < whole else few for rank in spec.head_ranks])
    return np.array(each).swapaxes(1, 2)


def table(budget: AbstractBudget, longest: int, specs) -> np.ndarray:
    """Slots per head of every layer for rows of every length, `[L, longest + 1]`."""
    lengths = np.arange(longest + 1)
    if isinstance(budget, RetrievalHeads):
        each = heads_table(budget, longest, specs)
        return -(-each.sum(axis=2) // each.shape[2])
    if budget.keep is not None:
        mean = ceil_share(lengths, budget.keep)
    elif budget.slots is not None:
        mean = np.minimum(lengths, budget.slots)
    else:
        assert budget.bytes is not None
        each = SLOT_BYTES * specs[0].num_kv_heads * len(specs)
        mean = np.minimum(lengths, int(budget.bytes // each))
    slots = np.tile(mean, (len(specs), 1))
    if isinstance(budget, Pyramid):
        slots = pyramid(mean, lengths, len(specs), budget)
    slots = np.clip(slots, 0, lengths)
    return np.maximum(slots, np.minimum(1, lengths)).astype(np.int64)


def chunk_slots(unit, counts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    if not isinstance(unit, Chunk) or not unit.whole:
        return counts
    chunks = -(-lengths // unit.size)
    kept = np.maximum(1, chunks * counts // np.maximum(lengths, 1))
    return np.minimum(kept * unit.size, lengths)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, exact.LONGEST),
    st.sampled_from(FLOATS) | st.floats(0, 1, allow_subnormal=False),
)
def test_shares_are_exact(n, keep):
    share = Fraction(repr(keep))
    assert exact.ceil_share(n, keep) == math.ceil(n * share)
    assert exact.floor_share(n, share) == math.floor(n * share)
    half = Fraction(1, 2)
    assert exact.floor_share(n, share, half) == math.floor(n * share + half)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, exact.LONGEST), min_size=1, max_size=5),
    st.lists(st.fractions(0, 1), min_size=1, max_size=4),
    st.fractions(0, Fraction(999, 1000)),
)
def test_shares_of_arrays_are_exact_and_fit_in_32_bits(counts, shares, more):
    want = [[math.floor(n * share + more) for n in counts] for share in shares]
    for xp in (np, jnp):
        n = xp.asarray([*counts, exact.LONGEST], np.int32)
        got = exact.floor_shares(n, tuple(shares), more)
        assert got.dtype == np.int32 and isinstance(got, type(n))
        np.testing.assert_array_equal(np.asarray(got)[:, :-1], want)


@pytest.mark.parametrize("keep", FLOATS)
def test_shares_are_the_same_on_a_device(keep):
    spread = np.random.default_rng(0).integers(0, exact.LONGEST, 500)
    n = np.concatenate([np.arange(500), exact.LONGEST - np.arange(500), spread])
    got = jax.jit(lambda x: exact.ceil_share(x, keep))(n.astype(np.int32))
    np.testing.assert_array_equal(got, ceil_share(n, keep))
    np.testing.assert_array_equal(got, exact.ceil_share(n.astype(np.int32), keep))


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, exact.LONGEST))
def test_products_over_counts_are_exact(data, over):
    n = data.draw(st.integers(0, over))
    most = data.draw(st.integers(0, 5000))
    times = data.draw(st.integers(0, most))
    assert exact.floor_product(n, times, over, most) == n * times // over
    one, by, of = (np.array([x], np.int32) for x in (n, times, over))
    assert exact.floor_product(one, by, of, most) == n * times // over


def random_budget(rng: np.random.Generator, kind: type, n: int) -> AbstractBudget:
    """Budgets of all kinds, often at the turns of the pyramid."""
    fields: dict[str, Any] = {}
    if kind is Pyramid:
        betas = [1, 1.5, 2, 2.3, 3, 7, 20, 64, round(1 + rng.exponential(5), 2)]
        fields["beta"] = float(rng.choice(betas))
        fields["window"] = int(rng.choice([1, 2, 8, 16, 30, 64, 200]))
    if kind is RetrievalHeads:
        fields["others"] = int(rng.integers(1, 80))
    if kind is AdaKV:
        fields["safeguard"] = float(rng.choice([0.0, 0.2, 0.29, 1.0]))
    unit = rng.choice(["keep", "slots", "bytes"])
    if unit == "keep" or kind is RetrievalHeads:
        near = [0.25, 0.5, 0.499, 0.4999, 0.5001, 0.51, 0.6, 0.9, 0.99, 1.0]
        keeps = [*near, *FLOATS[:8], round(rng.uniform(0.01, 1), 3)]
        return kind(keep=float(rng.choice(keeps)), **fields)
    slots = int(rng.integers(1, 400))
    if unit == "slots":
        return kind(slots=slots, **fields)
    return kind(bytes=int(slots * SLOT_BYTES * 2 * n + rng.integers(0, 100)), **fields)


KINDS = [Uniform, AdaKV, RetrievalHeads, Pyramid, Pyramid, Pyramid]


def check(budget: AbstractBudget, longest: int, specs, note: str = "") -> np.ndarray:
    """Counts and capacities are those of the table."""
    lengths = np.arange(longest + 1)
    want = table(budget, longest, specs)
    got = budget.counts(lengths, specs, SLOT_BYTES)
    assert got.dtype == np.int32 and isinstance(got, np.ndarray)
    np.testing.assert_array_equal(got, want, err_msg=f"{budget} {note}")
    most = np.maximum.accumulate(want, axis=1)
    for n in {0, 1, longest, *np.random.default_rng(0).integers(0, longest, 40)}:
        capacities = budget.capacities(int(n), specs, SLOT_BYTES)
        assert capacities == tuple(most[:, n]), (budget, n)
    return want


@pytest.mark.parametrize("seed", range(60))
def test_counts_and_capacities_of_every_length(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.choice([1, 2, 3, 4, 5, 7, 16]))
    budget = random_budget(rng, KINDS[seed % len(KINDS)], n)
    check(budget, int(rng.integers(1, 2000)), layers(n, 2, (None, 40)))


@pytest.mark.parametrize("name", compressions())
def test_presets(name):
    c = kvjax.compression(name)
    if c.evict is None:
        return
    specs, longest = layers(4), 3000
    want = check(c.evict.budget, longest, specs)
    lengths = np.arange(longest + 1)
    slots = chunk_slots(c.evict.unit, want, lengths)
    for n in (1, 60, 333, longest):
        most = c.evict.unit.capacities(c.evict.budget, n, specs, SLOT_BYTES)
        assert most == tuple(slots[:, : n + 1].max(axis=1))
    if c.evict.values is not None:
        check(c.evict.values, longest, specs)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 128),
    st.floats(1, 1e6) | st.sampled_from([1.1, 2.3, 20.0, 1 + 1e-15]),
    st.sampled_from(FLOATS),
    st.integers(1, 2000),
    st.lists(st.integers(0, 2**20), min_size=1, max_size=6),
)
def test_a_pyramid_of_any_beta_is_exact(n, beta, keep, window, lengths):
    budget, rows = Pyramid(keep=keep, beta=beta, window=window), np.array(lengths)
    want = pyramid(ceil_share(rows, keep), rows, n, budget)
    want = np.maximum(np.clip(want, 0, rows), np.minimum(rows, 1)).astype(np.int64)
    np.testing.assert_array_equal(budget.counts(rows, layers(n), 0.0), want)


@pytest.mark.parametrize("seed", range(12))
def test_counts_are_the_same_on_a_device(seed):
    rng = np.random.default_rng(seed)
    budget, specs = random_budget(rng, KINDS[seed % len(KINDS)], 5), layers(5)
    lengths = np.concatenate([np.arange(700), 2**20 - np.arange(300)])
    rows = lengths.astype(np.int32)
    got = jax.jit(lambda x: budget.counts(x, specs, SLOT_BYTES))(rows)
    assert got.dtype == jnp.int32
    host = budget.counts(rows, specs, SLOT_BYTES)
    np.testing.assert_array_equal(got, host)
    unit = Chunk(size=int(rng.integers(1, 50)), whole=True)
    np.testing.assert_array_equal(
        jax.jit(unit.slots)(got, rows),
        chunk_slots(unit, host.astype(np.int64), lengths),
    )
    if budget.per_head:
        ours = jax.jit(lambda c, x: budget.split(c, x, specs))(got, rows)
        for one, other in zip(ours, budget.split(host, rows, specs), strict=True):
            assert one.dtype == jnp.int32 and other.dtype == np.int32
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("seed", range(8))
def test_heads_split_what_a_layer_has(seed):
    rng, longest = np.random.default_rng(seed), 900
    specs = layers(3, 4, (None, 50, 300))
    lengths = np.arange(longest + 1)
    duo = random_budget(rng, RetrievalHeads, 3)
    assert isinstance(duo, RetrievalHeads)
    each = heads_table(duo, longest, specs)
    sure, total = duo.split(duo.counts(lengths, specs, 0.0), lengths, specs)
    np.testing.assert_array_equal(sure, each)
    np.testing.assert_array_equal(total, each.sum(axis=2))
    slots = Token().capacities(duo, longest, specs, 0.0)
    flat = duo.flat_capacities(slots, longest, specs)
    assert flat == tuple(total.max(axis=1))
    np.testing.assert_array_equal(
        duo.fewest(np.array([[9, 90]])), np.minimum([[9, 90]], duo.others)
    )

    ada = random_budget(rng, AdaKV, 3)
    assert isinstance(ada, AdaKV)
    unit = Chunk(size=7, whole=True)
    counts = unit.slots(ada.counts(lengths, specs, SLOT_BYTES), lengths)
    sure, total = ada.split(counts, lengths, specs)
    safe = [int(n * Fraction(repr(ada.safeguard))) for n in counts[0]]
    np.testing.assert_array_equal(sure[0, :, 3], np.maximum(safe, 1))
    np.testing.assert_array_equal(total, 4 * counts)
    slots = unit.capacities(ada, longest, specs, SLOT_BYTES)
    assert ada.flat_capacities(slots, longest, specs) == tuple(total.max(axis=1))


@pytest.mark.parametrize("seed", range(60))
def test_capacities_of_whole_chunks(seed):
    rng = np.random.default_rng(seed)
    n, longest = int(rng.choice([1, 2, 5, 9])), int(rng.integers(1, 3000))
    kind = [Uniform, Pyramid, AdaKV][seed % 3]
    budget, specs = random_budget(rng, kind, n), layers(n)
    unit = Chunk(size=int(rng.choice([1, 2, 3, 10, 20, 64])), whole=True)
    lengths = np.arange(longest + 1)
    counts = table(budget, longest, specs)
    want = chunk_slots(unit, counts, lengths)
    np.testing.assert_array_equal(unit.slots(counts, lengths), want)
    got = unit.capacities(budget, longest, specs, SLOT_BYTES)
    assert got == tuple(want.max(axis=1)), (budget, unit)


def test_bounds_are_what_long_rows_get():
    specs = layers(6)
    for budget in (Uniform(slots=90), Pyramid(slots=700, beta=9.0, window=16)):
        assert budget.bounds(specs, 0.0) == tuple(table(budget, 9000, specs)[:, -1])
    assert Pyramid(keep=0.5).bounds(specs, 0.0) is None
    with pytest.raises(ValueError, match="less than one slot"):
        Uniform(bytes=10).bounds(specs, SLOT_BYTES)


@pytest.mark.parametrize(
    "read", [Quest(), Quest(keep=0.07), Quest(keep=None, slots=70)]
)
def test_pages_of_a_read(read):
    held = np.arange(400)
    want = np.full_like(held, 5)  # 70 slots in pages of 16
    if read.keep is not None:
        want = ceil_share(held, read.keep)
    want = np.clip(want, 1, np.maximum(held, 1))
    pages = read.budget.read
    np.testing.assert_array_equal(pages(held), want)
    np.testing.assert_array_equal(jax.jit(pages)(held.astype(np.int32)), want)
    assert [most_pages(read.budget, n) for n in range(400)] == list(want)


def constants(jaxpr) -> int:
    """Bytes of the arrays in a traced program."""
    return sum(np.asarray(x).nbytes for x in jaxpr.consts)


@pytest.mark.parametrize("kind", [Uniform, AdaKV, RetrievalHeads, Pyramid])
def test_nothing_of_the_length_is_in_a_program(kind):
    specs, longest = layers(32, 8), 2**20
    budget, unit = kind(keep=0.25), Chunk(whole=True)
    most = unit.capacities(budget, longest, specs, SLOT_BYTES)
    assert len(most) == 32 and max(most) <= longest

    def run(lengths):
        return unit.slots(budget.counts(lengths, specs, SLOT_BYTES), lengths)

    program = jax.make_jaxpr(run)(np.array([longest], np.int32))
    assert constants(program) < 2**14
    assert len(program.eqns) < 600
