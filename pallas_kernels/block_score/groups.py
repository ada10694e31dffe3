"""What both modes come down to: vectors per group, and groups per block."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.pallas_kernels.block_score.args import BlockArgs


class Groups(NamedTuple):
    """Groups of queries and keys, scored by `sum_j q[g, j] . k[h, j] * scale`.

    Attributes:
        q: `[B, K, G, M, J, D]`, `M` query groups of `J` vectors; antidiagonal groups
            are still in the order of the tokens.
        k: `[B, K, N, J, D]`.
        per_q: query groups per block.
        per_k: key groups per block.
        size_q: queries per group.
        size_k: keys per group.
        scale: on the sum.
    """

    q: Float[Array, "B K G M J D"]
    k: Float[Array, "B K N J D"]
    per_q: int
    per_k: int
    size_q: int
    size_k: int
    scale: float


def grouped(args: BlockArgs) -> Groups:
    """Groups of a call; `mean` pools here, `antidiagonal` only reshapes."""
    block_q, block_k, stride, k = args.block_q, args.block_k, args.stride, args.k
    (b, h, t, d), (kv_heads, s) = args.q.shape, k.shape[1:3]
    q = args.q.reshape(b, kv_heads, h // kv_heads, t, d)
    if args.mode == "antidiagonal":
        return Groups(
            q.reshape(*q.shape[:3], t // stride, stride, d),
            k.reshape(b, kv_heads, s // stride, stride, d),
            block_q // stride,
            block_k // stride,
            stride,
            stride,
            args.scale / stride,
        )
    q = q.reshape(*q.shape[:3], t // block_q, block_q, d)
    k = k.reshape(b, kv_heads, s // block_k, block_k, d)
    q = jnp.mean(q, axis=4, keepdims=True, dtype=jnp.float32)
    k = jnp.mean(k, axis=3, keepdims=True, dtype=jnp.float32)
    return Groups(q, k, 1, 1, block_q, block_k, args.scale)
