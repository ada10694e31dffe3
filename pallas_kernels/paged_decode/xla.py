"""Attention over selected pages in plain XLA: some pages at a time, then a merge."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kvjax.pallas_kernels.paged_decode.args import PagedArgs
from kvjax.pallas_kernels.paged_decode.tables import log_weights
from kvjax.pallas_kernels.partial import Partial, cap, softmax_partial
from kvjax.pallas_kernels.quantize_pack.xla import dequantize
from kvjax.pallas_kernels.quantized import Quantized

CHUNK_SLOTS = 4096
"""Slots per head that are gathered at once; a larger selection goes in a scan."""


def paged_decode(args: PagedArgs) -> Partial:
    """See `api.paged_decode`. Temporaries: `CHUNK_SLOTS` gathered slots per head."""
    q, selected = args.q, args.selected
    (b, h, t, d), (_, kv_heads, c) = q.shape, selected.shape
    page = args.k_pages.shape[1]
    at = jnp.where(jnp.arange(c) < args.counts[..., None], selected, 0)
    weights = log_weights(args)
    queries = q.reshape(b, kv_heads, h // kv_heads * t, d)

    def attend(at: Array, weights: Array) -> Partial:
        shape = (b, kv_heads, at.shape[-1] * page, d)
        live = ~jnp.isneginf(weights)[..., None]
        keys = jnp.where(live, read(args.k_pages, at, q.dtype).reshape(shape), 0)
        # The product runs in the dtype of the keys, its sum in float32.
        rows = queries.astype(keys.dtype)
        logits = jnp.einsum(
            "BKXD,BKSD->BKXS", rows, keys, preferred_element_type=jnp.float32
        )
        logits = cap(logits * args.scale, args.softcap) + weights[:, :, None]
        slots = jnp.where(live, read(args.v_pages, at, q.dtype).reshape(shape), 0)
        return softmax_partial(logits, live.mT, slots)

    most = max(1, CHUNK_SLOTS // page)
    part = attend(at, weights) if c <= most else _in_chunks(attend, at, weights, most)
    return Partial(part.out.reshape(b, h, t, d), part.lse.reshape(b, h, t))


def read(pool: Array | Quantized, at: Array, dtype) -> Array:
    """The pages at `at`, `[*at, P, D]`; codes are gathered, then decoded."""
    taken = jax.tree.map(lambda x: jnp.take(x, at, axis=0, mode="clip"), pool)
    if not isinstance(taken, Quantized):
        return taken
    return dequantize(taken).astype(dtype)


def _in_chunks(attend, at: Array, weights: Array, most: int) -> Partial:
    """`attend` over `most` pages at a time."""
    b, kv_heads, c = at.shape
    count = -(-c // most)
    page = weights.shape[-1] // c
    short = count * most - c
    at = jnp.pad(at, [(0, 0), (0, 0), (0, short)])
    weights = jnp.pad(
        weights, [(0, 0), (0, 0), (0, short * page)], constant_values=-jnp.inf
    )

    def step(total: Partial, xs):
        return add(total, attend(*xs)), None

    xs = tuple(
        jnp.moveaxis(x.reshape(b, kv_heads, count, -1), 2, 0) for x in (at, weights)
    )
    first = jax.tree.map(lambda x: x[0], xs)
    shapes = jax.eval_shape(attend, *first)
    nothing = Partial(
        jnp.zeros(shapes.out.shape, jnp.float32),
        jnp.full(shapes.lse.shape, -jnp.inf, jnp.float32),
    )
    return jax.lax.scan(step, nothing, xs)[0]


def add(one: Partial, other: Partial) -> Partial:
    """Attention over both, exactly; either may have seen nothing."""
    lse = jnp.logaddexp(one.lse, other.lse)
    anchor = jnp.where(jnp.isneginf(lse), 0.0, lse)
    shares = (jnp.exp(part.lse - anchor)[..., None] for part in (one, other))
    left, right = shares
    return Partial(left * one.out + right * other.out, lse)
