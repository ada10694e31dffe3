"""Quantise and pack block by block: the Hopper kernel.

One thread block per block of slots, which it reads once. Values are spread over the
threads so that all channels that share a byte are in one thread, and packing crosses
none: by columns of bytes for `channel`, whose groups of slots then lie in registers,
by rows of a `wgmma` for `token`, whose groups of channels lie in four threads.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from kvjax.pallas_kernels import compat, tuning
from kvjax.pallas_kernels.quantize_pack.args import PackArgs
from kvjax.pallas_kernels.quantize_pack.xla import (
    SCALE_DTYPE,
    not_above,
    outwards,
)
from kvjax.pallas_kernels.quantized import Quantized, half_bits

ROWS, LANES, WARPS = 64, 32, 4
MOST_ROWS, NEAR_BYTES = 256, 96 << 10  # of one copy; two thread blocks share an SM
MOST_VALUES = 128 * 128  # of a group of slots: 128 registers per thread


def quantize_pack(
    args: PackArgs,
    *,
    tiles: Mapping[str, Any] | None = None,
    interpret: bool = False,
) -> Quantized:
    """See `api.quantize_pack`."""
    x, live, bits, group = args.x, args.live, args.bits, args.group
    *lead, s, d = x.shape
    channel, symmetric = args.axis == "channel", args.symmetric
    _refuse(d, bits, group, channel)
    block = tuning.tiles("quantize_pack", "h200", tiles)["block"]
    unit = group if channel else ROWS
    most = min(MOST_ROWS, NEAR_BYTES // (d * x.dtype.itemsize))
    block = max(unit, min(block, most, -(-s // unit) * unit) // unit * unit)
    rows, slots = math.prod(lead), -(-s // block) * block
    # Tiles in shared memory have 8 rows: other counts of slots are copied.
    x = jnp.pad(x.reshape(rows, s, d), [(0, 0), (0, -s % 8), (0, 0)])
    live = live.reshape(rows, s).astype(jnp.int32)
    live = jnp.pad(live, [(0, 0), (0, slots - s)])
    how = {"bits": bits, "group": group, "channel": channel, "symmetric": symmetric}
    codes, *found = _run(x, live, block, how, compat.gpu_interpret(interpret))

    def half(values: Array) -> Array:
        if channel:
            values = values[:, : s // group]
        else:
            values = jnp.swapaxes(values[..., :s], -1, -2)
        return half_bits(values.reshape(*lead, *values.shape[1:]))

    return Quantized(
        codes=codes[:, :s].reshape(*lead, s, -1),
        scale=half(found[0]),
        zero=None if symmetric else half(found[1]),
        bits=bits,
        axis=args.axis,
        group=group,
    )


def _run(x, live, block: int, how: dict[str, Any], interpret: Any) -> list[Array]:
    """Codes `[N, S, D * bits / 8]`, scales and zeros as `_kernel` has them."""
    (rows, s, d), slots = x.shape, live.shape[1]
    packed, group, channel = d * how["bits"] // 8, how["group"], how["channel"]
    transforms = ()
    if not channel:  # the tiles of a `wgmma`, for reads without conflicts of banks
        size = x.dtype.itemsize
        swizzle = plgpu.find_swizzle(d * size * 8)
        tiling = plgpu.TilingTransform((8, swizzle // size))  # pyright: ignore[reportAbstractUsage]
        transforms = (tiling, plgpu.SwizzleTransform(swizzle))  # pyright: ignore[reportAbstractUsage]
    # Rows of copies are multiples of 16 bytes: scales of slots leave turned over.
    side = (slots // group, d) if channel else (d // group, slots)
    near = (block // group, d) if channel else (d // group, block)
    sides = 1 if how["symmetric"] else 2
    run = plgpu.kernel(
        functools.partial(_kernel, **how),
        out_type=[
            jax.ShapeDtypeStruct((rows, s, packed), jnp.uint8),
            *[jax.ShapeDtypeStruct((rows, *side), SCALE_DTYPE)] * sides,
        ],
        scratch_types=dict(
            x_near=plgpu.SMEM((block, d), x.dtype, transforms=transforms),
            live_near=plgpu.SMEM((block,), jnp.int32),
            codes_near=plgpu.SMEM((block, packed), jnp.uint8),
            sides_near=[plgpu.SMEM(near, SCALE_DTYPE)] * sides,
            here=plgpu.Barrier(num_arrivals=2),
        ),
        grid=(slots // block, rows),
        grid_names=("step", "row"),
        interpret=interpret,
    )
    return run(x, live)


def _refuse(d: int, bits: int, group: int, channel: bool) -> None:
    why, packed = None, d * bits // 8
    if bits == 1:
        why = "1-bit codes have no GPU kernel"
    elif packed % 16:
        why = f"a slot must have a multiple of 16 bytes of codes; got {packed}"
    elif group % 8:
        why = f"groups must be a multiple of 8; got {group}"
    elif channel and group > min(MOST_ROWS, MOST_VALUES // d):
        why = f"a group of {group} slots of {d} channels does not fit the registers"
    elif d > MOST_ROWS:
        why = f"at most {MOST_ROWS} channels; got {d}"
    if why:
        raise NotImplementedError(f"quantize_pack: {why}.")


def _by_bytes(packed: int) -> Any:
    """A layout of `[slots, channels]` whose rows repeat in a thread every `packed`."""
    lanes = next(n for n in (16, 8, 4) if packed % (WARPS * n) == 0)
    rows = LANES // lanes
    return plgpu.Layout.TILED(
        plgpu.Tiling(((rows, WARPS * lanes), (rows, lanes), (1,))),
        warp_dims=(-4,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )


def _kernel(
    x_ref,  # [N, S, D] GMEM
    live_ref,  # [N, slots] int32 GMEM
    codes_ref,  # [N, S, D * bits / 8] uint8 GMEM
    *side_refs,  # scale, zero: [N, S / group, D], or [N, D / group, slots] GMEM
    x_near,
    live_near,
    codes_near,
    sides_near,
    here,
    bits: int,
    group: int,
    channel: bool,
    symmetric: bool,
):
    """The slots of one thread block."""
    step, row = lax.axis_index("step"), lax.axis_index("row")
    (block, d), packed = x_near.shape, codes_near.shape[1]
    some = pl.ds(step * block, block)
    plgpu.copy_gmem_to_smem(x_ref.at[row, some], x_near, here)
    plgpu.copy_gmem_to_smem(live_ref.at[row, some], live_near, here)
    plgpu.barrier_wait(here)
    tile = group if channel else ROWS
    layout = _by_bytes(packed) if channel else plgpu.Layout.WGMMA

    @pl.loop(0, block // tile)
    def _(i):
        slots = pl.ds(i * tile, tile)
        x = plgpu.load(x_near.at[slots], layout=layout, optimized=not channel)
        x = x.astype(jnp.float32)
        live = plgpu.load(live_near.at[slots], layout=layout.reduce(1), optimized=False)
        wide = d if channel else group
        live = lax.broadcast_in_dim(live, (tile, wide), [0]) > 0
        quantise = functools.partial(
            _quantised, live=live, axis=0 if channel else 1, bits=bits
        )
        parts = []
        for g in range(d // wide):
            part = x if channel else x[:, g * group : (g + 1) * group]
            codes, *sides = quantise(part, symmetric=symmetric)
            parts.append(codes)
            for near, side in zip(sides_near, sides, strict=True):
                to = near.at[i] if channel else near.at[g, slots]
                to[...] = side.astype(near.dtype)
        codes_near.at[slots][...] = _packed(parts, packed, bits)

    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(codes_near, codes_ref.at[row, some])
    groups = pl.ds(step * (block // group), block // group)
    for near, ref in zip(sides_near, side_refs, strict=True):
        to = (row, groups) if channel else (row, slice(None), some)
        plgpu.copy_smem_to_gmem(near, ref.at[to])
    plgpu.wait_smem_to_gmem(0)


def _quantised(x, *, live, axis: int, bits: int, symmetric: bool):
    """Codes of one group per row or column, its scale, and if any its zero."""
    top, half = 2**bits - 1, (2**bits - 1) // 2

    # One division per group; XLA, too, makes a product of one by a broadcast number.
    def along(side):
        return lax.broadcast_in_dim(side, x.shape, [1 - axis])

    if symmetric:
        reach = jnp.max(jnp.where(live, jnp.abs(x), 0.0), axis=axis)
        sides = [outwards(reach / half)]
        codes = jnp.round(x * along(1.0 / sides[0])) + half
    else:
        low = jnp.min(jnp.where(live, x, jnp.inf), axis=axis)
        high = jnp.max(jnp.where(live, x, -jnp.inf), axis=axis)
        some = low <= high
        zero = not_above(jnp.where(some, low, 0.0))
        sides = [outwards((jnp.where(some, high, 0.0) - zero) / top), zero]
        codes = jnp.round((x - along(zero)) * along(1.0 / sides[0]))
    codes = jnp.minimum(jnp.maximum(codes, 0.0), float(top))
    return jnp.where(live, codes, 0.0).astype(jnp.int32), *sides


def _packed(parts: list[Array], packed: int, bits: int) -> Array:
    """`xla.pack` of channels that lie in one array, or in one per group."""
    wide = parts[0].shape[1]
    unit = math.gcd(packed, wide)
    slabs = [p[:, i : i + unit] for p in parts for i in range(0, wide, unit)]
    each = packed // unit  # slices of a slab
    columns = []
    for j in range(each):
        column = slabs[j]
        for i in range(1, 8 // bits):
            column = column | (slabs[i * each + j] << (bits * i))
        columns.append(column)
    whole = columns[0] if each == 1 else jnp.concatenate(columns, axis=1)
    return whole.astype(jnp.uint8)
