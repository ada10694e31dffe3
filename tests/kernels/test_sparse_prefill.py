"""Properties of `sparse_prefill` that need no second implementation, and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas_kernels.dense import causal_attention
from kvjax.pallas_kernels.partial import merge
from kvjax.pallas_kernels.sparse_prefill import (
    BlockList,
    Diagonals,
    Shared,
    sparse_prefill,
)

B, H, K, D, BLOCK = 2, 4, 2, 16, 8
SCALE = 0.3
WHERE = pytest.mark.parametrize("backend", ["reference", "xla"])


def arrays(tokens: int, slots: int | None = None, seed: int = 0):
    rng = np.random.default_rng(seed)
    shapes = ((B, H, tokens, D), *[(B, K, slots or tokens, D)] * 2)
    return tuple(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)


def complete_list(tokens: int, slots: int) -> BlockList:
    rows, blocks = -(-tokens // BLOCK), -(-slots // BLOCK)
    index = jnp.broadcast_to(jnp.arange(blocks, dtype=jnp.int32), (B, 1, rows, blocks))
    counts = jnp.full((B, 1, rows), blocks, jnp.int32)
    return BlockList(index=index, counts=counts, block_q=BLOCK, block_k=BLOCK)


def diagonals(offsets) -> Diagonals:
    offsets = jnp.broadcast_to(jnp.asarray(offsets, jnp.int32), (B, 1, len(offsets)))
    counts = jnp.full((B, 1), offsets.shape[-1], jnp.int32)
    return Diagonals(offsets=offsets, counts=counts, block=BLOCK)


def shared(index) -> Shared:
    index = jnp.broadcast_to(jnp.asarray(index, jnp.int32), (B, 1, len(index)))
    counts = jnp.full((B, 1), index.shape[-1], jnp.int32)
    return Shared(index=index, counts=counts, block_q=BLOCK, block_k=BLOCK)


def assert_same(got, want, atol=2e-5):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


@WHERE
@pytest.mark.parametrize("start", [0, 13])
def test_complete_lists_are_dense_causal_attention(backend, start):
    tokens = 29
    q, k, v = arrays(tokens, tokens + start)
    got = sparse_prefill(
        q,
        k,
        v,
        complete_list(tokens, tokens + start),
        q_start=jnp.full((B,), start, jnp.int32),
        scale=SCALE,
        window=20,
        backend=backend,
    )
    positions = jnp.broadcast_to(jnp.arange(tokens + start), (B, tokens + start))
    want = causal_attention(
        q, k, v, positions[:, start:], positions, scale=SCALE, window=20
    )
    assert_same(got, want)


@WHERE
def test_diagonals_equal_the_list_of_the_same_blocks(backend):
    tokens, offsets = 40, (0, 3, 1)
    q, k, v = arrays(tokens)
    rows = tokens // BLOCK
    index = np.arange(rows)[:, None] - np.asarray(offsets)
    listed = BlockList(
        index=jnp.broadcast_to(jnp.asarray(index, jnp.int32), (B, 1, rows, 3)),
        counts=jnp.full((B, 1, rows), 3, jnp.int32),
        block_q=BLOCK,
        block_k=BLOCK,
    )
    one = sparse_prefill(q, k, v, diagonals(offsets), scale=SCALE, backend=backend)
    two = sparse_prefill(q, k, v, listed, scale=SCALE, backend=backend)
    assert_same(one, two)


@WHERE
def test_disjoint_diagonals_and_columns_merge_to_their_union(backend):
    # One query block: the diagonal lists block 5, the columns blocks 0 and 2.
    q, k, v = arrays(BLOCK, 6 * BLOCK)
    how = {
        "q_start": jnp.full((B,), 5 * BLOCK, jnp.int32),
        "scale": SCALE,
        "backend": backend,
    }
    near = sparse_prefill(q, k, v, diagonals((0,)), **how)
    far = sparse_prefill(q, k, v, shared((0, 2)), **how)
    both = sparse_prefill(q, k, v, shared((5, 0, 2)), **how)
    assert_same(merge([near, far]), both)


@WHERE
def test_what_is_past_a_count_or_a_length_does_not_matter(backend):
    q, k, v = arrays(16, 32)
    q_start = jnp.asarray([8, 0], jnp.int32)
    kv_len = jnp.asarray([19, 11], jnp.int32)
    free = (jnp.arange(32) >= kv_len[:, None])[:, None, :, None]
    how = {"q_start": q_start, "kv_len": kv_len, "scale": SCALE, "backend": backend}

    def run(filler, tail):
        index = jnp.asarray([0, 2, tail], jnp.int32)
        index = jnp.broadcast_to(index, (B, 1, 3))
        counts = jnp.full((B, 1), 2, jnp.int32)
        pattern = Shared(index=index, counts=counts, block_q=BLOCK, block_k=BLOCK)
        keys, values = (jnp.where(free, filler, x) for x in (k, v))
        return sparse_prefill(q, keys, values, pattern, **how)

    want = run(0.0, 0)
    for filler, tail in ((jnp.nan, -7), (jnp.inf, 1), (1e9, 1 << 30)):
        assert_same(run(filler, tail), want)


@WHERE
def test_a_query_without_keys_gives_zero_and_minus_infinity(backend):
    q, k, v = arrays(16)
    part = sparse_prefill(q, k, v, shared((1,)), scale=SCALE, backend=backend)
    assert np.all(np.asarray(part.out[:, :, :BLOCK]) == 0)
    assert np.all(np.isneginf(part.lse[:, :, :BLOCK]))
    assert np.all(np.isfinite(part.lse[:, :, BLOCK:]))


@WHERE
def test_rows_of_a_batch_do_not_meet(backend):
    q, k, v = arrays(24)
    whole = sparse_prefill(q, k, v, diagonals((0, 1)), scale=SCALE, backend=backend)
    pattern = jax.tree.map(lambda x: x[1:], diagonals((0, 1)))
    row = sparse_prefill(q[1:], k[1:], v[1:], pattern, scale=SCALE, backend=backend)
    assert_same(jax.tree.map(lambda x: x[1:], whole), row, atol=1e-6)


def test_gradient_of_the_log_sum_exp_alone():
    q, k, v = arrays(16)

    def loss(backend):
        def of(q, k, v):
            part = sparse_prefill(
                q, k, v, diagonals((0, 1)), scale=SCALE, backend=backend
            )
            return jnp.sum(jnp.sin(part.lse))

        return jax.grad(of, (0, 1, 2))(q, k, v)

    want = loss("reference")
    assert_same(loss("xla"), want)
    assert float(jnp.max(jnp.abs(want[2]))) == 0.0  # values do not enter it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.zeros((B, 3, 16, D))}, "multiple of the KV heads"),
        ({"v": jnp.zeros((B, K, 15, D))}, "`v` must be"),
        ({"k": jnp.zeros((B, K, 16, D), jnp.bfloat16)}, "dtype of `q`"),
        ({"q": jnp.zeros((H, 16, D))}, "4 axes"),
        ({"pattern": (0, 1)}, "BlockList, Diagonals or Shared"),
        ({"q_start": jnp.zeros((B + 1,), jnp.int32)}, "`q_start`"),
        ({"kv_len": jnp.zeros((B,))}, "`kv_len`"),
        ({"window": 0}, "`window`"),
        ({"sinks": -1}, "`sinks`"),
        ({"softcap": 0.0}, "`softcap`"),
        ({"pattern": shared(()), "sinks": 0}, "room for an entry"),
        ({"pattern": complete_list(64, 64)}, "BlockList entries"),
        ({"backend": "cpu"}, "`backend`"),
    ],
)
def test_mistakes_are_named(change, message):
    q, k, v = arrays(16)
    args = {"q": q, "k": k, "v": v, "pattern": shared((0,)), **change}
    if "k" in change and args["k"].shape != v.shape:
        args["v"] = args["k"]
    with pytest.raises(ValueError, match=message):
        sparse_prefill(**args, scale=SCALE)


@pytest.mark.parametrize(
    ("backend", "dtype", "reason"),
    [("tpu", "float32", "block_k"), ("gpu", "float32", "bfloat16")],
)
def test_a_backend_that_cannot_says_why(backend, dtype, reason):
    q, k, v = (x.astype(dtype) for x in arrays(16))
    with pytest.raises(NotImplementedError, match=f"sparse_prefill: .*{reason}"):
        sparse_prefill(q, k, v, shared((0,)), scale=SCALE, backend=backend)


def test_patterns_keep_their_static_sizes_through_jit():
    q, k, v = arrays(16)
    run = jax.jit(lambda *args: sparse_prefill(*args, scale=SCALE, backend="xla"))
    for pattern in (shared((0,)), diagonals((0,)), complete_list(16, 16)):
        assert run(q, k, v, pattern).out.shape == q.shape
