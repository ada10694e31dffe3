"""Grouped affine quantisation, bit packing and their inverse: the plain XLA path."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.pallas_kernels.quantize_pack.args import PackArgs
from kvjax.pallas_kernels.quantized import Quantized, half_bits, readable

SCALE_DTYPE = jnp.float16
# One float16 ulp is at most 2^-10 of the value: enough to round outwards, but for
# subnormal numbers, whose ulp is the smallest of them.
_ULP, _SMALLEST = 2.0**-10, 2.0**-24
_LARGEST = float(jnp.finfo(SCALE_DTYPE).max)


def quantize_pack(args: PackArgs) -> Quantized:
    """See `api.quantize_pack`."""
    x, live, bits, group = args.x, args.live, args.bits, args.group
    *lead, s, d = x.shape
    wide = jnp.where(live[..., None], x, 0).astype(jnp.float32)
    mask = jnp.broadcast_to(live[..., None], x.shape)
    if args.axis == "channel":
        shape, along = (*lead, s // group, group, d), -2
    else:
        shape, along = (*lead, s, d // group, group), -1
    grouped, mask = wide.reshape(shape), mask.reshape(shape)
    top = 2**bits - 1
    if args.symmetric:
        half = top // 2
        reach = jnp.max(jnp.where(mask, jnp.abs(grouped), 0), axis=along, keepdims=True)
        scale = outwards(reach / half)
        code = jnp.round(grouped / scale) + half
        zero = None
    else:
        low = jnp.min(jnp.where(mask, grouped, jnp.inf), axis=along, keepdims=True)
        high = jnp.max(jnp.where(mask, grouped, -jnp.inf), axis=along, keepdims=True)
        empty = low > high  # no live slot in this group
        low, high = jnp.where(empty, 0, low), jnp.where(empty, 0, high)
        if bits == 1:
            low, high = halves(grouped, mask, low, high, along)
        floor = not_above(low)
        scale = outwards((high - floor) / top)
        code = jnp.round((grouped - floor) / scale)
        zero = half_bits(jnp.squeeze(floor, along))
    code = jnp.where(mask, jnp.clip(code, 0, top), 0).astype(jnp.uint8)
    return Quantized(
        codes=pack(code.reshape(x.shape), bits),
        scale=half_bits(jnp.squeeze(scale, along)),
        zero=zero,
        bits=bits,
        axis=args.axis,
        group=group,
    )


def halves(x: Array, mask: Array, low: Array, high: Array, along: int) -> list[Array]:
    """Means of a group's values up to the middle of its range, and above it."""
    # Sums stay finite.
    x, low, high = (jnp.clip(one, -_LARGEST, _LARGEST) for one in (x, low, high))
    above = x > (low + high) / 2
    means = []
    for side, otherwise in ((mask & ~above, low), (mask & above, high)):
        count = jnp.sum(side, axis=along, keepdims=True, dtype=jnp.float32)
        total = jnp.sum(jnp.where(side, x, 0), axis=along, keepdims=True)
        means.append(jnp.where(count > 0, total / jnp.maximum(count, 1), otherwise))
    return means


def _half(x: Array) -> Array:
    """The nearest finite float16 value, held in float32."""
    x = jnp.clip(x, -_LARGEST, _LARGEST)
    return x.astype(SCALE_DTYPE).astype(jnp.float32)


def not_above(low: Array) -> Array:
    """A float16 value (held in f32) not above `low`."""
    floor = _half(low - jnp.abs(low) * _ULP)
    return jnp.where(floor > low, _half(floor - _SMALLEST), floor)


def outwards(scale: Array) -> Array:
    """A float16 value (held in f32) not below `scale`; 1 where a group is constant."""
    raised = _half(scale * (1 + _ULP))
    raised = jnp.where(raised < scale, _half(raised + _SMALLEST), raised)
    return jnp.where(raised > 0, raised, 1.0)


def pack(codes: Array, bits: int) -> Array:
    """`[..., D]` codes below `2**bits` into `[..., D * bits / 8]` bytes."""
    if bits == 8:
        return codes
    parts = jnp.split(codes, 8 // bits, axis=-1)
    packed = parts[0]
    for i, part in enumerate(parts[1:], start=1):
        packed = packed | (part << (bits * i))
    return packed


def unpack(packed: Array, bits: int) -> Array:
    """Inverse of `pack`, uint8."""
    if bits == 8:
        return packed
    for shift in (1, 2):  # four copies in one loop do not vectorise, two do
        if bits <= shift:
            packed = jnp.concatenate([packed, packed >> jnp.uint8(shift)], axis=-1)
            packed = jax.lax.optimization_barrier(packed)
    wide = jnp.concatenate([packed, packed >> jnp.uint8(4)], axis=-1)
    return wide & jnp.uint8(2**bits - 1)


def dequantize(quantized: Quantized) -> Float[Array, "*lead S D"]:
    """The float32 array that the codes stand for.

    Written for a CPU, see docs/log.md: shifted copies are concatenated, since selects
    between them do not vectorise, and scales of channels become float32 in a loop of
    their own, since their conversion would keep the loop over codes from vectorising.
    """
    quantized = readable(quantized)
    bits, group = quantized.bits, quantized.group
    codes = unpack(quantized.codes, bits).astype(jnp.float32)
    if quantized.zero is None:
        codes = codes - (2**bits - 1) // 2
    *lead, s, d = codes.shape
    scale = quantized.scale.astype(jnp.float32)
    zero = None if quantized.zero is None else quantized.zero.astype(jnp.float32)
    if quantized.axis == "token":
        scale, zero = jax.lax.optimization_barrier((scale, zero))
        out = codes * _over_channels(scale, group, d)
        return out if zero is None else out + _over_channels(zero, group, d)
    grouped = codes.reshape(*lead, s // group, group, d)
    out = grouped * jnp.expand_dims(scale, -2)
    if zero is not None:
        out = out + jnp.expand_dims(zero, -2)
    return out.reshape(*lead, s, d)


def _over_channels(scale: Array, group: int, channels: int) -> Array:
    """`[..., D / group]` to `[..., D]`, each element for `group` channels.

    Selects instead of a broadcast along a new axis: faster on a CPU, see docs/log.md.
    """
    channel = jnp.arange(channels)
    wide = scale[..., :1]
    for index in range(1, channels // group):
        wide = jnp.where(channel < index * group, wide, scale[..., index : index + 1])
    return wide
