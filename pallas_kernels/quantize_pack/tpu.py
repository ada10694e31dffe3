"""Quantise and pack block by block: the Mosaic TPU kernel.

Groups lie along sublanes: of the slots as they are for `channel`, of the transposed
block for `token`, so that no statistic crosses lanes. TPUs hold no float16: scales and
zeros leave the kernel as 16-bit patterns. Codes of less than 128 bytes per slot lie in
HBM with the slots along the lanes (XLA's own choice, nothing is padded), and so the
kernel writes them: else XLA would turn them over behind it.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kvjax.pallas_kernels import compat, tuning
from kvjax.pallas_kernels.quantize_pack.args import PackArgs
from kvjax.pallas_kernels.quantize_pack.rounding import not_above, outwards
from kvjax.pallas_kernels.quantized import Quantized

LANES = 128


def quantize_pack(
    args: PackArgs,
    *,
    tiles: Mapping[str, Any] | None = None,
    interpret: bool = False,
) -> Quantized:
    """See `api.quantize_pack`."""
    x, live, bits, group = args.x, args.live, args.bits, args.group
    _refuse(x, bits, group)
    *lead, s, d = x.shape
    rows = math.prod(lead)
    block = tuning.tiles("quantize_pack", None, tiles)["block"]
    channel = args.axis == "channel"
    size = _block(s, block, group if channel else 1)
    packed = d * bits // 8
    side = (rows, s // group, d) if channel else (rows, d // group, s)
    side_block = (1, size // group, d) if channel else (1, d // group, size)
    side_index = (lambda n, i: (n, i, 0)) if channel else (lambda n, i: (n, 0, i))
    sides = 1 if args.symmetric else 2
    turned = packed % LANES != 0
    codes = (rows, packed, s) if turned else (rows, s, packed)
    shapes = (
        jax.ShapeDtypeStruct(codes, jnp.uint8),
        *[jax.ShapeDtypeStruct(side, jnp.int16)] * sides,
    )
    x, live = x.reshape(rows, s, d), live.reshape(rows, 1, s).astype(jnp.int32)
    if not interpret:
        # Else XLA may copy `x` into VMEM before the kernel starts.
        x = pltpu.with_memory_space_constraint(x, pltpu.HBM)
    outs = pl.pallas_call(
        functools.partial(
            _kernel,
            bits=bits,
            channel=channel,
            group=group,
            symmetric=args.symmetric,
            turned=turned,
        ),
        grid=(rows, pl.cdiv(s, size)),  # rows of the batch and heads, blocks of slots
        in_specs=(
            pl.BlockSpec((1, size, d), lambda n, i: (n, i, 0)),
            pl.BlockSpec((1, 1, size), lambda n, i: (n, 0, i)),
        ),
        out_specs=(
            pl.BlockSpec((1, packed, size), lambda n, i: (n, 0, i))
            if turned
            else pl.BlockSpec((1, size, packed), lambda n, i: (n, i, 0)),
            *[pl.BlockSpec(side_block, side_index)] * sides,
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel")
        ),
        cost_estimate=pl.CostEstimate(
            flops=10 * x.size,
            transcendentals=0,
            bytes_accessed=x.size * x.dtype.itemsize
            + 4 * live.size
            + sum(o.size * o.dtype.itemsize for o in shapes),
        ),
        interpret=compat.tpu_interpret(interpret),
        name=f"kv_quantize_pack_{args.axis}{bits}",
    )(x, live)

    def side_of(out: Array, turned: bool) -> Array:
        out = jnp.swapaxes(out, -1, -2) if turned else out
        return out.reshape(*lead, *out.shape[1:])

    return Quantized(
        codes=side_of(outs[0], turned),
        scale=side_of(outs[1], not channel),
        zero=None if args.symmetric else side_of(outs[2], not channel),
        bits=bits,
        axis=args.axis,
        group=group,
    )


def _refuse(x: Array, bits: int, group: int) -> None:
    if bits == 1:
        raise NotImplementedError("quantize_pack: 1-bit codes have no TPU kernel.")
    if x.dtype == jnp.float16:
        raise NotImplementedError("quantize_pack: TPUs hold no float16; convert `x`.")
    if group % 8:
        raise NotImplementedError(
            f"quantize_pack: groups of a multiple of 8 on TPU; got {group}."
        )
    if (x.shape[-1] * bits // 8) % 8:
        raise NotImplementedError(
            f"quantize_pack: a multiple of 8 bytes per slot on TPU; got {x.shape[-1]} "
            f"channels of {bits} bits."
        )


def _block(slots: int, block: int, group: int) -> int:
    """Slots per program: all of them, or a multiple of the lanes and of the group."""
    unit = math.lcm(LANES, group * 16 // math.gcd(group, 16))
    size = max(unit, block // unit * unit)
    return slots if slots <= size else size


def _kernel(
    x_ref,  # [1, block, D]
    live_ref,  # [1, 1, block] int32
    codes_ref,  # [1, block, D * bits / 8] uint8, or turned
    *side_refs,  # scale, zero: [1, groups, D], or [1, groups, block], 16-bit patterns
    bits: int,
    channel: bool,
    group: int,
    symmetric: bool,
    turned: bool,
):
    x = x_ref[0].astype(jnp.float32)
    live = jnp.broadcast_to(live_ref[0].astype(jnp.float32), x.shape[::-1])
    if channel:
        live = live.T
    else:
        x = x.T
    along, across = x.shape
    shape = (along // group, group, across)
    mask = live.reshape(shape) > 0
    # Dead slots may hold NaN.
    x = jnp.where(mask, x.reshape(shape), 0.0)
    top = 2**bits - 1
    if symmetric:
        half = top // 2
        scale, words = outwards(jnp.max(jnp.abs(x), axis=1, keepdims=True) / half)
        codes = jnp.round(x / scale) + half
    else:
        low = jnp.min(jnp.where(mask, x, jnp.inf), axis=1, keepdims=True)
        high = jnp.max(jnp.where(mask, x, -jnp.inf), axis=1, keepdims=True)
        empty = low > high
        zero, zero_words = not_above(jnp.where(empty, 0.0, low))
        scale, words = outwards((jnp.where(empty, 0.0, high) - zero) / top)
        codes = jnp.round((x - zero) / scale)
        side_refs[1][0] = zero_words[:, 0].astype(jnp.int16)
    side_refs[0][0] = words[:, 0].astype(jnp.int16)
    codes = jnp.where(mask, jnp.clip(codes, 0.0, float(top)), 0.0).astype(jnp.int32)
    codes = codes.reshape(along, across)
    if channel and turned:
        codes = codes.T
    upright = channel and not turned  # channels along the lanes
    codes = _packed(codes, bits, -1 if upright else 0)
    codes_ref[0] = (codes if turned or upright else codes.T).astype(jnp.uint8)


def _packed(codes: Array, bits: int, axis: int) -> Array:
    """`xla.pack` along an axis, in 32-bit integers."""
    parts = jnp.split(codes, 8 // bits, axis=axis)
    packed = parts[0]
    for i, part in enumerate(parts[1:], start=1):
        packed = packed | (part << (bits * i))
    return packed
