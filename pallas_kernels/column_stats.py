"""Column sums of softmax attention without the S x S matrix: the plain XLA path."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.pallas_kernels.dense import query_chunk, visible
from kvjax.pallas_kernels.partial import cap
from kvjax.types import NEG_INF


def column_stats(
    q: Float[Array, "B H T D"],
    keys: Float[Array, "B K S D"],
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "B H S"]:
    """Attention mass each key receives, summed over the given queries.

    Args:
        q: the queries that vote, after RoPE, `[B, H, T, D]`.
        keys: `[B, K, S, D]`.
        q_positions: `[B, T]`; queries at -1 do not vote.
        k_positions: `[B, S]`; keys at -1 receive nothing.
        scale: factor on `q . k`.
        window: sliding window, or None.
        softcap: logit soft cap, or None.

    Cost: `O(T S)` work, temporaries linear in `S` (queries go in chunks).
    """
    (b, h, t, d), (kv_heads, s) = q.shape, keys.shape[1:3]
    groups = h // kv_heads
    keys = jnp.where((k_positions >= 0)[:, None, :, None], keys, 0)
    q = jnp.where((q_positions >= 0)[:, None, :, None], q, 0)
    chunk = query_chunk(t, b * h * s)
    count = -(-t // chunk)
    q = jnp.pad(q, [(0, 0), (0, 0), (0, count * chunk - t), (0, 0)])
    pad = [(0, 0), (0, count * chunk - t)]
    q_positions = jnp.pad(q_positions, pad, constant_values=-1)
    q = q.reshape(b, kv_heads, groups, count, chunk, d)

    def step(total, x):
        queries, positions = x
        logits = jnp.einsum(
            "BKGTD,BKSD->BKGTS", queries, keys, preferred_element_type="f4"
        )
        mask = visible(positions, k_positions, window)[:, None, None]
        logits = jnp.where(mask, cap(logits * scale, softcap), NEG_INF)
        peak = jnp.max(logits, axis=-1, keepdims=True)
        weight = jnp.exp(logits - jnp.where(jnp.isneginf(peak), 0.0, peak))
        mass = jnp.sum(weight, axis=-1)
        share = jnp.where(mass > 0, 1.0 / jnp.where(mass > 0, mass, 1.0), 0.0)
        return total + jnp.einsum("BKGTS,BKGT->BKGS", weight, share), None

    xs = (
        jnp.moveaxis(q, 3, 0),
        jnp.moveaxis(q_positions.reshape(b, count, chunk), 1, 0),
    )
    zero = jnp.zeros((b, kv_heads, groups, s), jnp.float32)
    if count == 1:
        total, _ = step(zero, jax.tree.map(lambda x: x[0], xs))
    else:
        total, _ = jax.lax.scan(step, zero, xs)
    return total.reshape(b, h, s)
