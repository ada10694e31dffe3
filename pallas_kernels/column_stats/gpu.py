"""Normalisers, then column sums and maxima, tile by tile: the Hopper kernels.

Two passes over the keys. The first splits them over thread blocks, whose log-sum-exps
XLA merges; in the second every thread block owns some keys and walks the queries that
see them. Blocks that no query of a tile sees are not read.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from kvjax.pallas_kernels import compat, gradients, tuning
from kvjax.pallas_kernels.column_stats import gpu_kernels, xla
from kvjax.pallas_kernels.column_stats.args import ColumnArgs
from kvjax.pallas_kernels.column_stats.diagonals import by_distance, in_line, start
from kvjax.pallas_kernels.column_stats.gpu_kernels import LOG2E, LOW, ROWS
from kvjax.pallas_kernels.column_stats.stats import ColumnStats

FAR = jnp.iinfo(jnp.int32).max
SHARED = 220 << 10  # bytes per thread block, less barriers and small buffers
MOST_SLASHED = 512
"""Queries that give diagonals: 64 keys write one number per query."""


class Plan(NamedTuple):
    """Static sizes and settings of one kernel."""

    block_q: int  # queries per step of `sums`
    block_k: int  # keys per step of `normalisers`
    queries: int  # padded
    keys: int  # padded
    groups: int  # compute warp groups
    row_tiles: int  # thread blocks along the rows of `normalisers`
    splits: int  # thread blocks along the keys of `normalisers`
    stages: int
    scale: float
    window: int | None
    softcap: float | None
    slash: bool

    @property
    def registers(self) -> tuple[int, int]:
        """Per thread that computes, and that copies."""
        return {1: (232, 40), 2: (232, 40), 4: (112, 24)}[self.groups]


def column_stats(
    args: ColumnArgs,
    *,
    tiles: Mapping[str, Any] | None = None,
    interpret: bool = False,
) -> ColumnStats:
    """See `api.column_stats`; with the `lse` of the queries, without the first pass."""
    _refuse(args.q, args.slash)
    args = dataclasses.replace(args, weights=args.factors)
    sizes = tuning.tiles("column_stats", "h200", tiles)
    if args.slash:  # what the skewed sums are written for
        sizes["block_q"] = ROWS
    run = functools.partial(_run, _plans(args, sizes), interpret)

    def kernel(args):
        if not args.slash:
            return run(args)
        together = in_line(args.q_positions, args.k_positions)
        return jax.lax.cond(together, run, xla.column_stats, args)

    return gradients.through(kernel, xla.column_stats, args)


def _refuse(q: Array, slash: bool) -> None:
    why = None
    if q.dtype == jnp.float32:
        why = "the tensor cores multiply bfloat16 or float16; got float32"
    elif q.shape[3] % 16:
        why = f"the head dim must be a multiple of 16; got {q.shape[3]}"
    elif slash and q.shape[2] > MOST_SLASHED:
        why = f"diagonals of {MOST_SLASHED} queries at most; got {q.shape[2]}"
    if why:
        raise NotImplementedError(f"column_stats: {why}.")


def _plans(args: ColumnArgs, sizes: Mapping[str, int]) -> tuple[Plan, Plan]:
    """Of the normalisers, and of the sums."""
    (b, h, t, d), (kv_heads, s) = args.q.shape, args.keys.shape[1:3]
    most = 4 * ROWS * ROWS
    block_q, block_k = (
        max(ROWS, min(sizes[name], 4 * ROWS) // ROWS * ROWS)
        for name in ("block_q", "block_k")
    )
    block_q = min(block_q, -(-t // ROWS) * ROWS)
    queries = -(-t // block_q) * block_q
    tiles = h // kv_heads * queries // ROWS
    # Four warp groups of 64 x 64 logits, or two of 64 x 128, fit the registers.
    groups = next(n for n in (4, 2, 1) if tiles % n == 0 and n * block_k * ROWS <= most)
    # The skewed tiles of two warp groups fill what shared memory is left.
    groups_k = 2 if args.slash else most // (block_q * ROWS)
    while groups_k > 1 and s <= ROWS * groups_k // 2:
        groups_k //= 2
    blocks = -(-s // block_k)
    programs = b * kv_heads * tiles // groups
    plan = Plan(
        block_q=block_q,
        block_k=block_k,
        queries=queries,
        keys=blocks * block_k,
        groups=groups,
        row_tiles=tiles // groups,
        splits=max(1, min(sizes["programs"] // programs, blocks)),
        stages=_stages(sizes["stages"], d, groups * ROWS, block_k),
        scale=args.scale,
        window=args.window,
        softcap=args.softcap,
        slash=args.slash,
    )
    second = plan._replace(
        groups=groups_k,
        keys=-(-s // (ROWS * groups_k)) * ROWS * groups_k,
        stages=_stages(sizes["stages"], d, groups_k * ROWS, block_q, args.slash),
    )
    return plan, second


def _stages(most: int, d: int, rows: int, columns: int, slash: bool = False) -> int:
    """Steps that are copied ahead, as far as there is shared memory for them."""
    room = SHARED - rows * d * 2 - (rows * 3 * ROWS * 4 if slash else 0)
    return max(1, min(most, room // (columns * d * 2)))


def _run(plans: tuple[Plan, Plan], interpret, args: ColumnArgs) -> ColumnStats:
    first, second = plans
    b, h, t, d = args.q.shape
    kv_heads, s = args.keys.shape[1:3]
    more = (0, first.queries - t)
    q = jnp.pad(args.q, [(0, 0), (0, 0), more, (0, 0)])
    # Tiles in shared memory have 8 rows: other counts of keys are copied.
    keys = jnp.pad(args.keys, [(0, 0), (0, 0), (0, -s % 8), (0, 0)])
    at_q = jnp.pad(args.q_positions, [(0, 0), more], constant_values=-1)
    weights = jnp.pad(args.factors, [(0, 0), (0, 0), more])
    if first.slash:  # Backwards, so that diagonals go up with rows and columns.
        q, weights, at_q = jnp.flip(q, 2), jnp.flip(weights, 2), jnp.flip(at_q, 1)
    q = q.reshape(b, kv_heads, -1, d)

    def padded(plan):
        more = (0, plan.keys - s)
        return jnp.pad(args.k_positions, [(0, 0), more], constant_values=-1)

    if args.lse is None:
        lse = _normalisers(first, interpret, q, keys, at_q, padded(first))
    else:
        lse = jnp.pad(args.lse * LOG2E, [(0, 0), (0, 0), more], constant_values=LOW)
        lse = jnp.flip(lse, 2) if first.slash else lse
        lse = lse.reshape(b, kv_heads, -1)
    # A weight is a factor in the exponent; rows that count nothing vanish there.
    shift = lse - jnp.log2(weights.reshape(lse.shape))
    shift = jnp.where(lse > LOW / 2, shift, -LOW)
    found = _sums(second, interpret, q, keys, at_q, padded(second), shift)
    total, highest = (x.reshape(b, h, -1)[..., :s] for x in found[:2])
    along = None
    if second.slash:
        # Distance of the first diagonal.
        last = start(args.q_positions) + second.queries - 1
        along = _joined(found[2].reshape(b, h, *found[2].shape[3:]))
        along = by_distance(along, last, s)
    return ColumnStats(total, highest, along)


def _joined(frames: Float[Array, "B H N W"]) -> Float[Array, "B H M"]:
    """Sums of diagonals, of which each 64 keys have given a frame 64 further on."""
    count, parts = frames.shape[2], frames.shape[3] // ROWS
    frames = frames.reshape(*frames.shape[:3], parts, ROWS)
    total = jnp.zeros((*frames.shape[:2], count + parts - 1, ROWS), frames.dtype)
    for part in range(parts):
        total = total.at[:, :, part : part + count].add(frames[:, :, :, part])
    return total.reshape(*total.shape[:2], -1)


def _span(crossed: Array) -> tuple[Array, Array]:
    """First, and one behind the last, of the marked entries of the last axis."""
    at = jnp.arange(crossed.shape[-1], dtype=jnp.int32)
    low = jnp.min(jnp.where(crossed, at, FAR), axis=-1)
    high = jnp.max(jnp.where(crossed, at + 1, 0), axis=-1)
    return jnp.minimum(low, high), high


def _bounds(at: Array, block: int) -> tuple[Array, Array]:
    """First and last live position of each block, `[B, blocks]`; none: not crossed."""
    at = at.reshape(at.shape[0], -1, block)
    return jnp.min(jnp.where(at >= 0, at, FAR), axis=-1), jnp.max(at, axis=-1)


def _crossed(plan: Plan, of_q, of_k) -> Array:
    """Whether queries of a block may see keys of another, `[B, blocks, blocks]`."""
    (first_q, last_q), (first_k, last_k) = of_q, of_k
    crossed = first_k[:, None] <= last_q[:, :, None]
    if plan.window is not None:
        near = first_q[:, :, None] - plan.window < last_k[:, None]
        crossed = crossed & near
    return crossed


def _near(d: int, dtype: Any):
    """`(count, rows) -> ` shared memory for operands of products."""
    swizzle = plgpu.find_swizzle(d * 16)
    tiling = plgpu.TilingTransform((8, swizzle // 2))  # pyright: ignore[reportAbstractUsage]
    transforms = (tiling, plgpu.SwizzleTransform(swizzle))  # pyright: ignore[reportAbstractUsage]
    return lambda *size: plgpu.SMEM((*size, d), dtype, transforms=transforms)


def _normalisers(plan: Plan, interpret, q, keys, at_q, at_k) -> Array:
    """Log-sum-exp in base 2, `[B, K, rows]`; `LOW` where nothing is seen."""
    b, kv_heads, rows, d = q.shape
    # A thread block has rows of one head, or of several with all their queries.
    wide = plan.groups * ROWS
    wide = plan.queries if plan.queries % wide else wide
    of_q = _bounds(at_q, wide)
    low, high = _span(_crossed(plan, of_q, _bounds(at_k, plan.block_k)))
    low, high = (jnp.tile(x, (1, plan.row_tiles // x.shape[1])) for x in (low, high))
    near = _near(d, q.dtype)
    run = plgpu.kernel(
        functools.partial(gpu_kernels.normalisers, plan=plan),
        out_type=jax.ShapeDtypeStruct((b, kv_heads, plan.splits, rows), jnp.float32),
        scratch_types=dict(
            q_near=near(plan.groups, ROWS),
            k_near=near(plan.stages, plan.block_k),
            at_q_near=plgpu.SMEM((plan.groups, ROWS), jnp.int32),
            at_k_near=plgpu.SMEM((plan.stages, plan.block_k), jnp.int32),
            out_near=plgpu.SMEM((plan.groups, ROWS), jnp.float32),
            q_here=plgpu.Barrier(num_arrivals=2, num_barriers=plan.groups),
            k_here=plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
            free=plgpu.Barrier(num_arrivals=plan.groups, num_barriers=plan.stages),
        ),
        grid=(plan.row_tiles, plan.splits, kv_heads, b),
        grid_names=("tile", "split", "head", "row"),
        num_threads=plan.groups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=compat.gpu_interpret(interpret),
    )
    parts = run(q, keys, at_q, at_k, low, high)
    peak = jnp.max(parts, axis=2)
    mass = jnp.sum(jnp.exp2(parts - peak[:, :, None]), axis=2)
    return jnp.where(peak > LOW / 2, peak + jnp.log2(mass), LOW)


def _sums(plan: Plan, interpret, q, keys, at_q, at_k, shift) -> list[Array]:
    b, kv_heads, rows, d = q.shape
    heads = rows // plan.queries
    block = plan.groups * ROWS
    crossed = _crossed(plan, _bounds(at_q, plan.block_q), _bounds(at_k, block))
    low, high = _span(jnp.swapaxes(crossed, 1, 2))
    near = _near(d, q.dtype)
    found = plgpu.SMEM((plan.groups, heads, ROWS), jnp.float32)
    columns = jax.ShapeDtypeStruct((b, kv_heads, heads, plan.keys), jnp.float32)
    outs, skew = [columns, columns], {}
    if plan.slash:
        wide = -(-(plan.queries + ROWS) // 128) * 128  # whole vectors of a warp group
        frames = (b, kv_heads, heads, plan.keys // ROWS, wide)
        outs.append(jax.ShapeDtypeStruct(frames, jnp.float32))
        tile = (plan.groups, ROWS, plan.block_q + 2 * ROWS)
        skew["skew_near"] = plgpu.SMEM(tile, jnp.float32)
        skew["along_near"] = plgpu.SMEM((plan.groups, wide), jnp.float32)
    run = plgpu.kernel(
        functools.partial(gpu_kernels.sums, plan=plan),
        out_type=outs,
        scratch_types=dict(
            k_near=near(plan.groups, ROWS),
            q_near=near(plan.stages, plan.block_q),
            at_k_near=plgpu.SMEM((plan.groups, ROWS), jnp.int32),
            at_q_near=plgpu.SMEM((plan.stages, plan.block_q), jnp.int32),
            shift_near=plgpu.SMEM((plan.stages, plan.block_q), jnp.float32),
            sum_near=found,
            max_near=found,
            k_here=plgpu.Barrier(num_arrivals=2, num_barriers=plan.groups),
            q_here=plgpu.Barrier(num_arrivals=3, num_barriers=plan.stages),
            free=plgpu.Barrier(num_arrivals=plan.groups, num_barriers=plan.stages),
            **skew,
        ),
        grid=(plan.keys // block, kv_heads, b),
        grid_names=("tile", "head", "row"),
        num_threads=plan.groups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=compat.gpu_interpret(interpret),
    )
    return run(q, keys, at_q, at_k, shift, low, high)
