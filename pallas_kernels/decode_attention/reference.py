"""The specification of `decode_attention`: everything in float32, nothing clever."""

import jax.numpy as jnp

from kvjax.pallas_kernels import stacked
from kvjax.pallas_kernels.decode_attention.args import DecodeArgs
from kvjax.pallas_kernels.partial import Partial, cap, softmax_partial
from kvjax.pallas_kernels.quantize_pack import dequantize
from kvjax.pallas_kernels.quantized import Quantized


def decode_attention(args: DecodeArgs) -> Partial:
    """See `api.decode_attention`."""
    q, lengths, offsets = args.q, args.lengths, args.offsets
    (b, h, t, d), kv_heads = q.shape, lengths.shape[1]
    stored = args.keys, args.values, args.positions
    keys, values, positions = stacked.rows(stored, args.row, b)
    k, v = plain(keys), plain(values)
    start = jnp.zeros_like(lengths)
    if offsets is not None:
        start = offsets[:, :-1]
        # Every head looks at all slots, masked.
        k, v = (jnp.repeat(x[:, None], kv_heads, axis=1) for x in (k, v))
        positions = None if positions is None else positions[:, None]
    slot = jnp.arange(k.shape[2])
    held = (slot >= start[..., None]) & (slot < (start + lengths)[..., None])
    seen = held[:, :, None, :]
    if positions is not None and args.q_positions is not None:
        at, now = positions[:, :, None, :], args.q_positions[:, None, :, None]
        seen = seen & (at >= 0) & (at <= now)
        if args.window is not None:
            seen = seen & (now - at < args.window)
    seen = jnp.broadcast_to(seen, (b, kv_heads, t, k.shape[2]))
    live = jnp.any(seen, axis=2)[..., None]
    k, v = jnp.where(live, k, 0.0), jnp.where(live, v, 0.0)
    queries = q.astype(jnp.float32).reshape(b, kv_heads, -1, t, d)
    logits = jnp.einsum("BKGTD,BKSD->BKGTS", queries, k) * args.scale
    logits = cap(logits, args.softcap)
    part = softmax_partial(logits, seen[:, :, None], v[:, :, None])
    return Partial(part.out.reshape(b, h, t, d), part.lse.reshape(b, h, t))


def plain(side):
    """Keys or values in float32."""
    if isinstance(side, Quantized):
        return dequantize(side)
    return side.astype(jnp.float32)
