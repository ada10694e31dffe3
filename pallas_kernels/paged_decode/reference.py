"""Attention over selected pages, written out: the specification."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.pallas_kernels.paged_decode.args import PagedArgs
from kvjax.pallas_kernels.partial import Partial, cap, softmax_partial
from kvjax.pallas_kernels.quantized import Quantized, readable


def paged_decode(args: PagedArgs) -> Partial:
    """See `api.paged_decode`."""
    selected, bias = args.selected, args.bias
    (b, h, t, d), (_, kv_heads, c) = args.q.shape, selected.shape
    page = args.k_pages.shape[1]
    listed = jnp.arange(c) < args.counts[..., None]  # [B, K, C]
    fill = jnp.full_like(selected, page) if args.fill is None else args.fill
    live = listed[..., None] & (jnp.arange(page) < fill[..., None])
    live = live.reshape(b, kv_heads, 1, 1, c * page)
    if bias is not None:
        live = live & ~jnp.isneginf(bias[:, :, None, None])
    at = jnp.where(listed, selected, 0)

    def read(pool: Array | Quantized) -> Array:
        slots = values(pool)[at].reshape(b, kv_heads, 1, c * page, d)
        return jnp.where(live[:, :, :, 0, :, None], slots, 0)

    queries = args.q.astype(jnp.float32).reshape(b, kv_heads, h // kv_heads, t, d)
    logits = jnp.einsum("BKGTD,BKXSD->BKGTS", queries, read(args.k_pages))
    logits = cap(logits * args.scale, args.softcap)
    if bias is not None:
        logits = logits + bias[:, :, None, None]
    part = softmax_partial(logits, live, read(args.v_pages))
    return Partial(part.out.reshape(b, h, t, d), part.lse.reshape(b, h, t))


def values(pool: Array | Quantized) -> Float[Array, "N P D"]:
    """What a pool stands for, in float32."""
    if not isinstance(pool, Quantized):
        return pool.astype(jnp.float32)
    pool = readable(pool)
    slabs = [pool.codes >> shift for shift in range(0, 8, pool.bits)]
    codes = jnp.concatenate(slabs, axis=-1) & (2**pool.bits - 1)
    along = -2 if pool.axis == "channel" else -1
    scale = jnp.repeat(pool.scale.astype(jnp.float32), pool.group, axis=along)
    codes = codes.astype(jnp.float32)
    if pool.zero is None:
        return (codes - (2**pool.bits - 1) // 2) * scale
    zero = jnp.repeat(pool.zero.astype(jnp.float32), pool.group, axis=along)
    return codes * scale + zero
