"""Block mass from the whole map over groups, summed by hand: the specification."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.pallas_kernels.block_score.args import BlockArgs
from kvjax.types import NEG_INF


def block_score(args: BlockArgs) -> Float[Array, "B H T_block_q S_block_k"]:
    """See `api.block_score`."""
    block_q, block_k, mode, stride = args.block_q, args.block_k, args.mode, args.stride
    (b, h, t, _), (kv_heads, s) = args.q.shape, args.k.shape[1:3]
    q = args.q.astype(jnp.float32)
    k = jnp.repeat(args.k.astype(jnp.float32), h // kv_heads, axis=1)
    size_q, size_k = (block_q, block_k) if mode == "mean" else (stride, stride)
    if mode == "mean":
        q = jnp.mean(q.reshape(b, h, t // size_q, size_q, -1), axis=3)
        k = jnp.mean(k.reshape(b, h, s // size_k, size_k, -1), axis=3)
        logits = jnp.einsum("BHXD,BHYD->BHXY", q, k) * args.scale
    else:
        every = jnp.einsum("BHTD,BHSD->BHTS", q, k) * args.scale
        cells = every.reshape(b, h, t // stride, stride, s // stride, stride)
        logits = sum(cells[:, :, :, stride - 1 - j, :, j] for j in range(stride))
        logits = jnp.asarray(logits) / stride
    if args.causal:
        end = (jnp.arange(t // size_q) + 1) * size_q - 1 + s - t
        start = jnp.arange(s // size_k) * size_k
        logits = jnp.where(start <= end[:, None], logits, NEG_INF)
    weight = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
    shape = (b, h, t // block_q, block_q // size_q, s // block_k, block_k // size_k)
    return jnp.sum(weight.reshape(shape), axis=(3, 5))
