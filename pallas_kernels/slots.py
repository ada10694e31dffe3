"""Attention of a few queries over a block of cache slots: the plain XLA path."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.pallas_kernels.partial import Partial, cap, softmax_partial


def slot_mask(
    q_positions: Int[Array, "B T"],
    positions: Int[Array, "B K S"],
    window: int | None,
) -> Bool[Array, "B K T S"]:
    """Slots each query may see: live, not later than it, inside its window."""
    q, k = q_positions[:, None, :, None], positions[:, :, None, :]
    seen = (k >= 0) & (k <= q)
    return seen if window is None else seen & (q - k < window)


def slot_logits(
    q: Float[Array, "B H T D"],
    keys: Float[Array, "B K S D"],
    *,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B K G T S"]:
    """Scaled, capped logits in float32, without expanding the KV heads."""
    b, h, t, d = q.shape
    kv_heads, s = keys.shape[1:3]
    queries = q.reshape(b, kv_heads, (h // kv_heads) * t, d).astype(keys.dtype)
    logits = jnp.einsum("BKXD,BKSD->BKXS", queries, keys, preferred_element_type="f4")
    return cap(logits * scale, softcap).reshape(b, kv_heads, h // kv_heads, t, s)


def attend_block(
    q: Float[Array, "B H T D"],
    keys: Float[Array, "B K S D"],
    values: Float[Array, "B K S C"],
    mask: Bool[Array, "B K T S"],
    *,
    scale: float,
    softcap: float | None = None,
    in_pieces: bool = False,
) -> Partial:
    """Partial attention over one block of slots.

    Args:
        q: queries after RoPE, `[B, H, T, D]`.
        keys: `[B, K, S, D]`; what masked slots hold is never used.
        values: `[B, K, S, C]`, likewise.
        mask: `[B, K, T, S]`, see `slot_mask`.
        scale: factor on `q . k`.
        softcap: logit soft cap, or None.
        in_pieces: sum weights as `row_sum` does.

    Returns:
        `Partial(out [B, H, T, C], lse [B, H, T])` in float32.
    """
    b, h, t, _ = q.shape
    kv_heads, s = keys.shape[1:3]
    live = jnp.any(mask, axis=2)[..., None]
    # Free slots may hold NaN: 0 * NaN would reach outputs or gradients.
    keys, values = jnp.where(live, keys, 0), jnp.where(live, values, 0)
    logits = slot_logits(q, keys, scale=scale, softcap=softcap)
    mask = jnp.broadcast_to(mask[:, :, None], logits.shape)
    rows = (b, kv_heads, h // kv_heads * t, s)
    weighed = (logits.reshape(rows), mask.reshape(rows), values)
    part = softmax_partial(*weighed, in_pieces=in_pieces)
    return Partial(part.out.reshape(b, h, t, -1), part.lse.reshape(b, h, t))


def slot_mass(
    q: Float[Array, "B H T D"],
    lse: Float[Array, "B H T"],
    keys: Float[Array, "B K S D"],
    mask: Bool[Array, "B K T S"],
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B H T S"]:
    """Softmax weights of slots given the log-sum-exp over the whole cache."""
    b, h, t, _ = q.shape
    kv_heads, s = keys.shape[1:3]
    live = jnp.any(mask, axis=2)[..., None]
    logits = slot_logits(q, jnp.where(live, keys, 0), scale=scale, softcap=softcap)
    anchor = jnp.where(jnp.isneginf(lse), 0.0, lse).reshape(b, kv_heads, -1, t, 1)
    weight = jnp.where(mask[:, :, None], jnp.exp(logits - anchor), 0.0)
    return weight.reshape(b, h, t, s)
