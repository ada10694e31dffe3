"""Scores of pages in plain XLA: two products, and no copy of whole bounds."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kvjax.pallas_kernels import stacked
from kvjax.pallas_kernels.page_score.args import PageArgs


def page_score(args: PageArgs) -> Array:
    """See `api.page_score`.

    Temporaries: the scores of all heads, and with `row` the rows read of the bounds.
    """
    q, group, kv_heads = args.q, args.group, args.a.shape[1]
    rows, h, t, d = q.shape
    a, b = stacked.rows((args.a, args.b), args.row, rows)
    queries = q.reshape(rows, kv_heads, h // kv_heads * t, d)
    if args.mode == "bound":
        # Negative channels of a query meet the minimum, positive ones the maximum.
        down, up = jnp.minimum(queries, 0), jnp.maximum(queries, 0)
        score = _product(a, down) + _product(b, up)
    else:
        score = _product(a, queries)
    # XLA 0.11.2 fuses two bf16 products and a maximum into one CPU kernel whose result
    # is -inf from 512 pages on; the barrier keeps the maximum out.
    score = jax.lax.optimization_barrier(score)
    score = score.reshape(rows, kv_heads, a.shape[2], h // kv_heads, t)
    if group.startswith("softmax"):
        score = jax.nn.softmax(score * args.scale, axis=2)
    combined = jnp.max(score, 3) if group.endswith("max") else jnp.sum(score, 3)
    return jnp.swapaxes(combined, 2, 3)


def _product(pages: Array, queries: Array) -> Array:
    """`[B, K, P, X]`; pages first is twice as fast on a CPU in float32."""
    if queries.dtype != pages.dtype:
        queries, pages = queries.astype(jnp.float32), pages.astype(jnp.float32)
    return jnp.einsum("BKPD,BKXD->BKPX", pages, queries, preferred_element_type="f4")
