"""Scores of pages, written out: the specification."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kvjax.pallas_kernels import stacked
from kvjax.pallas_kernels.page_score.args import PageArgs


def page_score(args: PageArgs) -> Array:
    """See `api.page_score`."""
    q, group, kv_heads = args.q, args.group, args.a.shape[1]
    rows, h, t, d = q.shape
    a, b = stacked.rows((args.a, args.b), args.row, rows)
    grouped = q.astype(jnp.float32).reshape(rows, kv_heads, h // kv_heads, t, 1, d)
    score = grouped * a.astype(jnp.float32)[:, :, None, None]
    if args.mode == "bound":
        score = jnp.maximum(score, grouped * b.astype(jnp.float32)[:, :, None, None])
    score = jnp.sum(score, axis=-1)  # [B, K, G, T, P]
    if args.scale is not None:  # the softmax groups
        score = jax.nn.softmax(score * args.scale, axis=-1)
    return jnp.max(score, 2) if group.endswith("max") else jnp.sum(score, 2)
