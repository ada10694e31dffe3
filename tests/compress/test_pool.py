"""One buffer for layers of different sizes holds what a buffer for each would."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.cache import Ragged, Slots
from kvjax.codecs import AbstractCodec, Affine, Plain
from kvjax.compress.plan import LayerPlan, Storage
from kvjax.compress.pool import aligned, empty_pool, pour
from kvjax.compress.survey import Layout
from kvjax.types import EMPTY
from tests.compress.samples import SPECS
from tests.small import preset

SPEC, BATCH = SPECS["d16_g2"], 2
CODECS: dict[str, AbstractCodec] = {
    "plain": Plain(),
    "by token": Affine(bits=4, axis="token", group=8),
    "by channel": Affine(bits=2, axis="channel", group=8),
}
SIZES = st.sampled_from([(7,), (12, 3, 40, 8), (1, 16, 16), (33, 5, 1, 2, 33)])
"""Few, so that programs are compiled once; what heads hold is drawn."""
POUR = jax.jit(pour)
ENCODE = jax.jit(lambda codec, *given: codec.encode(*given), static_argnums=(0, 4))
ATTEND = jax.jit(
    lambda part, q, at, turn=None: part.attend(q, at, SPEC, turn=turn),
)


def layout(slots: int, **fields) -> Layout:
    return Layout(plan=LayerPlan(**fields), slots=slots, full=slots, pooled=True)


def pieces(sizes, how: Layout):
    """First slot and slots of every layer's piece, `[L, B]` each."""
    counts = np.array(aligned(sizes, how, SPEC.num_kv_heads), np.int32)
    counts = jnp.asarray(np.repeat(counts[:, None], BATCH, axis=1))
    return jnp.cumsum(counts, axis=0) - counts, counts


def up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def encoded(codec: AbstractCodec, rng, positions):
    """Codes of random vectors at `positions`, and zeros where there are none."""
    live = positions >= 0
    x = jnp.asarray(rng.normal(size=(*positions.shape, SPEC.head_dim)), jnp.float32)
    return ENCODE(codec, jnp.where(live[..., None], x, 0), live, positions, SPEC.rope)


def filled(rng, shape, most) -> np.ndarray:
    """Positions of up to `most` tokens in front of every head; the rest is free."""
    held = rng.integers(0, most + 1, shape[:-1])
    steps = rng.integers(1, 5, shape)  # in order, and none twice
    order = np.cumsum(steps, axis=-1)
    return np.where(np.arange(shape[-1]) < held[..., None], order, EMPTY)


def same(ours, part) -> None:
    """A layer of the pool attends as its part does."""
    rng = np.random.default_rng(1)
    q = jnp.asarray(rng.normal(size=(BATCH, SPEC.num_heads, 1, 16)), jnp.float32)
    at = jnp.full((BATCH, 1), 500, jnp.int32)
    pool, turn = ours
    want = ATTEND(part, q, at)
    for got in (
        ATTEND(pool, q, at, jnp.int32(turn)),
        ATTEND(pool.layer(turn), q, at),
    ):
        np.testing.assert_allclose(got.lse, want.lse, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got.out, want.out, rtol=1e-5, atol=1e-5)
    piece = pool.layer(turn)
    for row, theirs in zip(piece.live_positions(), part.live_positions(), strict=True):
        for one, other in zip(row, theirs, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.sweep(0, 2)
@settings(deadline=None, max_examples=6)
@given(sizes=SIZES, seed=st.integers(0, 99))
@pytest.mark.parametrize("name", CODECS)
def test_heads_of_one_size(name, sizes, seed):
    codec, rng = CODECS[name], np.random.default_rng(seed)
    multiple, heads = codec.append_multiple, SPEC.num_kv_heads
    how = layout(max(sizes), store=Storage(keys=codec, values=codec))
    width = up(max(sizes), multiple)
    pool = empty_pool(how, sizes, SPEC, BATCH, jnp.dtype("float32"))
    assert pool.positions.shape[-1] == heads * sum(up(n, multiple) for n in sizes)
    parts = []
    for n in sizes:
        positions = jnp.asarray(filled(rng, (BATCH, heads, width), n), jnp.int32)
        keys, values = (encoded(codec, rng, positions) for _ in range(2))
        parts.append(Slots(keys=keys, values=values, positions=positions))
    given = pieces(sizes, how)
    for turn in rng.permutation(len(sizes)):
        pool = POUR(pool, parts[turn], jnp.int32(turn), *(x[turn] for x in given))
    for turn, part in enumerate(parts):
        same((pool, turn), part)


@pytest.mark.sweep(0, 2)
@settings(deadline=None, max_examples=6)
@given(sizes=SIZES, seed=st.integers(0, 99))
@pytest.mark.parametrize("name", CODECS)
def test_heads_that_share(name, sizes, seed):
    codec, rng = CODECS[name], np.random.default_rng(seed)
    multiple, heads = codec.append_multiple, SPEC.num_kv_heads
    store = Storage(keys=codec, values=codec)
    how = layout(max(sizes), evict=preset("adakv_snapkv").evict, store=store)
    pool = empty_pool(how, sizes, SPEC, BATCH, jnp.dtype("float32"))
    assert pool.positions.shape[-1] == sum(up(n, multiple) for n in sizes)
    width, parts = up(max(sizes), multiple), []
    for n in sizes:
        cuts = np.sort(rng.integers(0, n + 1, (BATCH, heads)), axis=1)
        offsets = np.concatenate([np.zeros((BATCH, 1), int), cuts], axis=1)
        positions = np.full((BATCH, width), EMPTY)
        for row in range(BATCH):
            for first, stop in zip(offsets[row], offsets[row, 1:], strict=False):
                own = rng.choice(200, stop - first, replace=False)
                positions[row, first:stop] = np.sort(own)
        positions = jnp.asarray(positions, jnp.int32)
        keys, values = (encoded(codec, rng, positions) for _ in range(2))
        parts.append(
            Ragged(
                keys=keys,
                values=values,
                positions=positions,
                offsets=jnp.asarray(offsets, jnp.int32),
            )
        )
    given = pieces(sizes, how)
    for turn in rng.permutation(len(sizes)):
        pool = POUR(pool, parts[turn], jnp.int32(turn), *(x[turn] for x in given))
    for turn, part in enumerate(parts):
        same((pool, turn), part)


def test_the_layers_of_a_loop():
    """Poured with a traced number, one after the other."""
    rng, sizes, codec = np.random.default_rng(0), (5, 12, 3), Plain()
    how = layout(12)
    pool = empty_pool(how, sizes, SPEC, BATCH, jnp.dtype("float32"))
    shape = (BATCH, SPEC.num_kv_heads, 12)
    held = [jnp.asarray(filled(rng, shape, n), jnp.int32) for n in sizes]
    parts = [
        Slots(keys=encoded(codec, rng, x), values=encoded(codec, rng, x), positions=x)
        for x in held
    ]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *parts)

    def one(pool, given):
        turn, part, piece = given
        return pour(pool, part, turn, *piece), None

    where = pieces(sizes, how)
    turns = jnp.arange(3, dtype=jnp.int32)
    looped, _ = jax.lax.scan(one, pool, (turns, stack, where))
    for turn, part in enumerate(parts):
        pool = pour(pool, part, jnp.int32(turn), *(x[turn] for x in where))
    jax.tree.map(np.testing.assert_array_equal, looped, pool)
