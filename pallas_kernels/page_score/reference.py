"""Scores of pages, written out: the specification."""

import jax
import jax.numpy as jnp

from kvjax.pallas_kernels import stacked


def page_score(q, a, b, *, mode, group, scale, row=None):
    """See `api.page_score`."""
    (rows, h, t, d), kv_heads = q.shape, a.shape[1]
    a, b = stacked.rows((a, b), row, rows)
    grouped = q.astype(jnp.float32).reshape(rows, kv_heads, h // kv_heads, t, 1, d)
    score = grouped * a.astype(jnp.float32)[:, :, None, None]
    if mode == "bound":
        score = jnp.maximum(score, grouped * b.astype(jnp.float32)[:, :, None, None])
    score = jnp.sum(score, axis=-1)  # [B, K, G, T, P]
    if group.startswith("softmax"):
        score = jax.nn.softmax(score * scale, axis=-1)
    return jnp.max(score, 2) if group.endswith("max") else jnp.sum(score, 2)
