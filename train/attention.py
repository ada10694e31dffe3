"""Causal attention for training on short rows: dense, blocked by prefix."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.types import LayerInputs, group_queries

BLOCK = 256
"""Queries per block; a block multiplies only the keys up to its own end."""


def prefix_attention(inputs: LayerInputs) -> Float[Array, "B H T D"]:
    """Causal attention of rows whose positions are `0 .. T-1`, padding at the end.

    Padding is later than every token and so needs no mask of its own; its outputs are
    arbitrary and must carry no loss. Half the work of a full score matrix, and faster
    than the O(S)-memory path while a block's scores fit into the cache.
    """
    spec = inputs.spec
    b, h, t, d = inputs.q.shape
    q = group_queries(inputs.q, spec.num_kv_heads)
    blocks = []
    for start in range(0, t, BLOCK):
        end = min(start + BLOCK, t)
        k, v = inputs.k[:, :, :end], inputs.v[:, :, :end]
        logits = jnp.einsum(
            "BKGTD,BKSD->BKGTS",
            q[:, :, :, start:end],
            k,
            preferred_element_type=jnp.float32,
        )
        late = jnp.arange(end)[None, :] > jnp.arange(start, end)[:, None]
        late = late.reshape((1, 1, 1, *late.shape))
        weights = jax.nn.softmax(jnp.where(late, -1e30, logits * spec.scale), axis=-1)
        blocks.append(jnp.einsum("BKGTS,BKSD->BKGTD", weights.astype(v.dtype), v))
    return jnp.concatenate(blocks, axis=3).reshape(b, h, t, d)
