"""The whole softmax matrix, and its columns and diagonals: the specification."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.pallas_kernels.column_stats.stats import ColumnStats
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
    weights: Float[Array, "B H T"] | None = None,
    lse: Float[Array, "B H T"] | None = None,
    slash: bool = False,
) -> ColumnStats:
    """See `api.column_stats`."""
    h, s = q.shape[1], keys.shape[2]
    keys = jnp.where((k_positions >= 0)[:, None, :, None], keys, 0)
    q = jnp.where((q_positions >= 0)[:, None, :, None], q, 0)
    k = jnp.repeat(keys.astype(jnp.float32), h // keys.shape[1], axis=1)
    logits = jnp.einsum("BHTD,BHSD->BHTS", q.astype(jnp.float32), k) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    seen = (k_positions[:, None, :] >= 0) & (distance >= 0)
    if window is not None:
        seen = seen & (distance < window)
    seen = seen[:, None]
    logits = jnp.where(seen, logits, NEG_INF)
    peak = jnp.max(logits, axis=-1, keepdims=True)
    weight = jnp.exp(logits - jnp.where(jnp.isneginf(peak), 0.0, peak))
    total = jnp.sum(weight, axis=-1, keepdims=True)
    rows = weight / jnp.where(total > 0, total, 1.0)
    if lse is not None:
        off = jnp.isneginf(lse)[..., None]
        rows = jnp.where(seen & ~off, jnp.exp(logits - lse[..., None]), 0.0)
    if weights is not None:
        rows = rows * weights[..., None]
    along = None
    if slash:
        on = (distance[..., None] == jnp.arange(s)).astype(jnp.float32)
        along = jnp.einsum("BHTS,BTSD->BHD", rows, on)
    return ColumnStats(jnp.sum(rows, axis=2), jnp.max(rows, axis=2), along)
