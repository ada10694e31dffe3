"""The whole softmax matrix, and its columns and diagonals: the specification."""

import jax.numpy as jnp

from kvjax.pallas_kernels.column_stats.args import ColumnArgs
from kvjax.pallas_kernels.column_stats.stats import ColumnStats
from kvjax.types import NEG_INF


def column_stats(args: ColumnArgs) -> ColumnStats:
    """See `api.column_stats`."""
    q_positions, k_positions, lse = args.q_positions, args.k_positions, args.lse
    h, s = args.q.shape[1], args.keys.shape[2]
    keys = jnp.where((k_positions >= 0)[:, None, :, None], args.keys, 0)
    q = jnp.where((q_positions >= 0)[:, None, :, None], args.q, 0)
    k = jnp.repeat(keys.astype(jnp.float32), h // keys.shape[1], axis=1)
    logits = jnp.einsum("BHTD,BHSD->BHTS", q.astype(jnp.float32), k) * args.scale
    if args.softcap is not None:
        logits = args.softcap * jnp.tanh(logits / args.softcap)
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    seen = (k_positions[:, None, :] >= 0) & (distance >= 0)
    if args.window is not None:
        seen = seen & (distance < args.window)
    seen = seen[:, None]
    logits = jnp.where(seen, logits, NEG_INF)
    peak = jnp.max(logits, axis=-1, keepdims=True)
    weight = jnp.exp(logits - jnp.where(jnp.isneginf(peak), 0.0, peak))
    total = jnp.sum(weight, axis=-1, keepdims=True)
    rows = weight / jnp.where(total > 0, total, 1.0)
    if lse is not None:
        off = jnp.isneginf(lse)[..., None]
        rows = jnp.where(seen & ~off, jnp.exp(logits - lse[..., None]), 0.0)
    if args.weights is not None:
        rows = rows * args.weights[..., None]
    along = None
    if args.slash:
        on = (distance[..., None] == jnp.arange(s)).astype(jnp.float32)
        along = jnp.einsum("BHTS,BTSD->BHD", rows, on)
    return ColumnStats(jnp.sum(rows, axis=2), jnp.max(rows, axis=2), along)
