"""Grouped quantisation, written out: the specification."""

import jax.numpy as jnp
from jaxtyping import Array

from kvjax.pallas_kernels.quantize_pack.args import PackArgs
from kvjax.pallas_kernels.quantized import Quantized, half_bits

LARGEST, SMALLEST, ULP = 65504.0, 2.0**-24, 2.0**-10
"""Of float16: largest number, smallest one, and relative spacing of normal ones."""


def quantize_pack(args: PackArgs) -> Quantized:
    """See `api.quantize_pack`."""
    x, live, bits, group = args.x, args.live, args.bits, args.group
    *lead, s, d = x.shape
    channel = args.axis == "channel"
    shape = (*lead, s // group, group, d) if channel else (*lead, s, d // group, group)
    along = -2 if channel else -1
    mask = jnp.broadcast_to(live[..., None], x.shape).reshape(shape)
    values = jnp.where(mask, x.astype(jnp.float32).reshape(shape), 0)
    top = 2**bits - 1
    if args.symmetric:
        zero, half = None, top // 2
        scale = outwards(jnp.max(jnp.abs(values), axis=along, keepdims=True) / half)
        codes = jnp.round(values / scale) + half
    else:
        low = jnp.min(jnp.where(mask, values, jnp.inf), axis=along, keepdims=True)
        high = jnp.max(jnp.where(mask, values, -jnp.inf), axis=along, keepdims=True)
        some = jnp.any(mask, axis=along, keepdims=True)
        low, high = jnp.where(some, low, 0), jnp.where(some, high, 0)
        if bits == 1:
            low, high, near = (
                jnp.clip(x, -LARGEST, LARGEST) for x in (low, high, values)
            )
            above = near > (low + high) / 2
            low = mean(near, mask & ~above, along, low)
            high = mean(near, mask & above, along, high)
        zero = not_above(low)
        scale = outwards((high - zero) / top)
        codes = jnp.round((values - zero) / scale)
        zero = half_bits(jnp.squeeze(zero, along))
    codes = jnp.where(mask, jnp.clip(codes, 0, top), 0)
    return Quantized(
        codes=pack(codes.astype(jnp.uint8).reshape(x.shape), bits),
        scale=half_bits(jnp.squeeze(scale, along)),
        zero=zero,
        bits=bits,
        axis=args.axis,
        group=group,
    )


def mean(x: Array, of: Array, along: int, otherwise: Array) -> Array:
    """Mean of the marked values of each group, `otherwise` where there are none."""
    total = jnp.sum(jnp.where(of, x, 0), axis=along, keepdims=True)
    count = jnp.sum(of, axis=along, keepdims=True, dtype=jnp.float32)
    return jnp.where(count > 0, total / jnp.maximum(count, 1), otherwise)


def half(x: Array) -> Array:
    """The nearest finite float16 number, in float32."""
    nearest = jnp.clip(x, -LARGEST, LARGEST).astype(jnp.float16)
    return nearest.astype(jnp.float32)


def not_above(low: Array) -> Array:
    """A float16 number below `low` by two spacings at most."""
    below = half(low - jnp.abs(low) * ULP)
    # Subnormal numbers are spaced more widely than `ULP` says.
    return jnp.where(below > low, half(below - SMALLEST), below)


def outwards(scale: Array) -> Array:
    """A float16 number not below `scale`; 1 where a group is constant."""
    raised = half(scale * (1 + ULP))
    raised = jnp.where(raised < scale, half(raised + SMALLEST), raised)
    return jnp.where(raised > 0, raised, 1.0)


def pack(codes: Array, bits: int) -> Array:
    """Byte `j` of `[..., D * bits / 8]` holds channels `j, j + D/n, ...`, low first."""
    per_byte = 8 // bits
    slabs = codes.reshape(*codes.shape[:-1], per_byte, -1)
    shifts = jnp.arange(per_byte, dtype=jnp.uint8)[:, None] * bits
    return jnp.sum(slabs << shifts, axis=-2, dtype=jnp.uint8)
