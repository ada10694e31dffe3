"""Block mass, a chunk of query groups at a time: the plain XLA path."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.pallas_kernels.block_score.args import BlockArgs
from kvjax.pallas_kernels.block_score.groups import grouped
from kvjax.pallas_kernels.dense import query_chunk
from kvjax.types import NEG_INF


def block_score(args: BlockArgs) -> Float[Array, "B H T_block_q S_block_k"]:
    """See `api.block_score`."""
    b, h, t, _ = args.q.shape
    s = args.k.shape[2]
    g = grouped(args)
    kv_heads, per_head, rows, size, d = g.q.shape[1:]
    columns = g.k.shape[2]
    # One long vector per group: the antidiagonal of a tile is one dot product.
    queries = jnp.flip(g.q, axis=4).reshape(b, kv_heads, per_head, rows, size * d)
    keys = g.k.reshape(b, kv_heads, columns, size * d)
    start = jnp.arange(columns) * g.size_k

    def some(x):
        part, first = x
        n = part.shape[3]
        flat = part.reshape(b, kv_heads, per_head * n, size * d)
        logits = jnp.einsum("BKXC,BKYC->BKXY", flat, keys, preferred_element_type="f4")
        logits = (logits * g.scale).reshape(b, h, n, columns)
        if args.causal:
            end = (first + jnp.arange(n) + 1) * g.size_q - 1 + s - t
            logits = jnp.where(start <= end[:, None], logits, NEG_INF)
        weight = jax.nn.softmax(logits, axis=-1)
        shape = (b, h, n // g.per_q, g.per_q, columns // g.per_k, g.per_k)
        return jnp.sum(weight.reshape(shape), axis=(3, 5))

    blocks = query_chunk(rows // g.per_q, b * h * columns * g.per_q)
    while (rows // g.per_q) % blocks:
        blocks -= 1
    chunk = blocks * g.per_q
    if chunk == rows:
        return some((queries, 0))
    count = rows // chunk
    parts = jnp.moveaxis(
        queries.reshape(b, kv_heads, per_head, count, chunk, size * d), 3, 0
    )
    firsts = jnp.arange(count, dtype=jnp.int32) * chunk
    out = jax.lax.map(jax.checkpoint(some), (parts, firsts))
    return jnp.moveaxis(out, 0, 2).reshape(b, h, t // args.block_q, s // args.block_k)
