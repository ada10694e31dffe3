"""Normalisers, then column and diagonal sums, tile by tile: the Mosaic TPU kernel.

For every block of queries the grid walks the keys twice: a running log-sum-exp per
query first, then the sums of the normalised weights of each tile over its queries.
Keys of a head stay in VMEM from their first visit on, as many as fit, and so are read
from HBM once, not twice per block of queries. Tiles that no query of a block sees cost
no arithmetic. With `lse` given the first walk falls away.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kvjax.pallas_kernels import compat, gradients, tuning
from kvjax.pallas_kernels.column_stats import sparing, tpu_kernels, xla
from kvjax.pallas_kernels.column_stats.args import ColumnArgs
from kvjax.pallas_kernels.column_stats.diagonals import by_distance, in_line, start
from kvjax.pallas_kernels.column_stats.stats import ColumnStats

LANES = tpu_kernels.LANES
FAR = jnp.iinfo(jnp.int32).max
VMEM = 60 << 20
"""That a kernel may take; v7x has 64 MiB, the others more."""
SPARE = 7 << 20
"""Of it, for the temporaries of a step."""


class Plan(NamedTuple):
    """Static sizes and settings of one call.

    Attributes:
        groups: query heads per KV head.
        together: KV heads whose results share a block: 8 rows, which XLA keeps so.
        whole: results of all keys stay in VMEM, over all blocks of queries.
        resident: blocks of keys that stay in VMEM.
    """

    block_q: int
    block_k: int
    queries: int
    blocks_k: int
    groups: int
    together: int
    whole: bool
    resident: int
    slash: bool
    given: bool
    scale: float
    window: int | None
    softcap: float | None
    interpret: Any


def column_stats(
    args: ColumnArgs,
    *,
    tiles: Mapping[str, Any] | None = None,
    interpret: bool = False,
) -> ColumnStats:
    """See `api.column_stats`."""
    if args.q.dtype == jnp.float16:
        raise NotImplementedError("column_stats: TPUs hold no float16; use bfloat16.")
    args = dataclasses.replace(args, weights=args.factors)
    plan = make_plan(args, tuning.tiles("column_stats", None, tiles))
    plan = plan._replace(interpret=compat.tpu_interpret(interpret))

    def kernel(args):
        run = functools.partial(_run, plan)
        if not args.slash:
            return run(args)
        together = in_line(args.q_positions, args.k_positions)
        return jax.lax.cond(together, run, sparing.column_stats, args)

    return gradients.through(kernel, xla.column_stats, args)


def make_plan(args: ColumnArgs, sizes: Mapping[str, int]) -> Plan:
    """What fits into VMEM.

    Raises:
        NotImplementedError: not even the results of several blocks of queries do.
    """
    (_, h, t, d), (_, kv_heads, s, _) = args.q.shape, args.keys.shape
    block_q, block_k = _block(t, sizes["block_q"], 8), _block(s, sizes["block_k"], 1)
    queries, blocks_k = -(-t // block_q) * block_q, -(-s // block_k)
    groups, wide = h // kv_heads, blocks_k * block_k
    item, d = args.q.dtype.itemsize, -(-d // LANES) * LANES
    row = 2 * 2 * 4 * wide  # sum and max of one head, and where they leave from
    every = 8 // math.gcd(groups, 8)
    together = every if kv_heads % every == 0 else kv_heads
    room = VMEM - SPARE - 8 * wide - 2 * item * block_q * groups * d
    room -= 2 * item * block_k * d  # keys on their way
    if args.slash:
        room -= 2 * 4 * groups * (wide + queries + block_q + 2 * LANES)
    block = item * block_k * d
    whole = together * groups * row + 2 * block <= room
    if not whole:
        together, whole = 1, queries > block_q
    room -= together * groups * row if whole else 8 * row * block_k // wide
    resident = max(0, min(blocks_k, room // block))
    if whole and not resident:
        raise NotImplementedError(
            f"column_stats: sums of {t} queries over {s} keys do not fit into the "
            "memory of a TPU core. Use fewer queries, one block of them, or fewer keys."
        )
    if resident < blocks_k:
        resident = max(0, resident - 1)  # one block for those that pass through
    return Plan(
        block_q=block_q,
        block_k=block_k,
        queries=queries,
        blocks_k=blocks_k,
        groups=groups,
        together=together,
        whole=whole,
        resident=resident,
        slash=args.slash,
        given=args.lse is not None,
        scale=args.scale,
        window=args.window,
        softcap=args.softcap,
        interpret=None,
    )


def _block(size: int, block: int, unit: int) -> int:
    """A multiple of the lanes, or all of a short axis rounded up to `unit`."""
    block = max(LANES, block // LANES * LANES)
    return block if size > block else -(-size // unit) * unit


def _run(plan: Plan, args: ColumnArgs) -> ColumnStats:
    (b, h, t, d), keys = args.q.shape, args.keys
    kv_heads, s = keys.shape[1:3]
    more = (0, plan.queries - t)
    q = jnp.pad(args.q, [(0, 0), (0, 0), more, (0, 0)])
    at_q = jnp.pad(args.q_positions, [(0, 0), more], constant_values=-1)
    rows = [args.factors] if args.lse is None else [args.factors, args.lse]
    rows = [jnp.pad(x, [(0, 0), (0, 0), more]) for x in rows]
    if plan.slash:  # Backwards, so that diagonals go up with rows and columns.
        q, at_q = jnp.flip(q, 2), jnp.flip(at_q, 1)
        rows = [jnp.flip(x, 2) for x in rows]
    wide = plan.blocks_k * plan.block_k
    at_k = jnp.pad(args.k_positions, [(0, 0), (0, wide - s)], constant_values=-1)
    bounds = _bounds(at_q, at_k, plan)
    q = q.reshape(b, kv_heads, plan.groups, plan.queries, d)
    rows = [x.reshape(q.shape[:-1]) for x in rows]
    at_k = at_k.reshape(b, plan.blocks_k, plan.block_k)
    if not plan.interpret:
        # Else XLA may copy keys into VMEM before the kernel starts.
        keys = pltpu.with_memory_space_constraint(keys, pltpu.HBM)
    sums, highest, *along = _call(plan, bounds, q, keys, at_q[:, None], at_k, rows)
    sums, highest = (x.reshape(b, h, wide)[..., :s] for x in (sums, highest))
    if not along:
        return ColumnStats(sums, highest, None)
    last = start(args.q_positions) + plan.queries - 1  # distance of the first diagonal
    along = by_distance(along[0].reshape(b, h, -1), last, s)
    return ColumnStats(sums, highest, along)


def _bounds(at_q: Array, at_k: Array, plan: Plan) -> tuple[Array, ...]:
    """First and last live position of each block, `[B, blocks]`; none: not crossed."""

    def of(at, block):
        at = at.reshape(at.shape[0], -1, block)
        first = jnp.min(jnp.where(at >= 0, at, FAR), axis=-1)
        return first, jnp.max(at, axis=-1)

    return (*of(at_q, plan.block_q), *of(at_k, plan.block_k))


def _call(plan: Plan, bounds, q, keys, at_q, at_k, rows) -> list[Array]:
    """The kernel; grid: rows, KV heads, query blocks, walks, key blocks."""
    b, kv_heads, groups, queries, d = q.shape
    grid = (b, kv_heads, queries // plan.block_q, 1 + (not plan.given), plan.blocks_k)
    in_specs, out_specs, shapes = _specs(plan, b, kv_heads, d, len(rows))
    item = q.dtype.itemsize
    read = plan.blocks_k + (grid[2] * grid[3] - 1) * (plan.blocks_k - plan.resident)
    room = plan.resident + (plan.resident < plan.blocks_k)
    state = pltpu.VMEM((groups, plan.block_q, 1), jnp.float32)
    return pl.pallas_call(
        functools.partial(tpu_kernels.kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=(
                state,
                state,
                pltpu.VMEM((room, plan.block_k, d), keys.dtype),
            ),
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) + ("arbitrary",) * 4,
            vmem_limit_bytes=VMEM,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * grid[3] * q.size * keys.shape[2],
            transcendentals=grid[3] * (q.size // d) * keys.shape[2],
            bytes_accessed=item * (q.size + b * kv_heads * read * plan.block_k * d)
            + 4 * (len(rows) * q.size // d + sum(x.size for x in (*shapes, at_k))),
        ),
        interpret=plan.interpret,
        name="kv_column_stats",
    )(*bounds, q, keys, at_q, at_k, *rows)


def _specs(plan: Plan, b: int, kv_heads: int, d: int, rows: int):
    """Block specs of operands and results, and the shapes of the latter."""
    groups, block_q, block_k = plan.groups, plan.block_q, plan.block_k
    wide = plan.blocks_k * block_k

    def fetched(b, k, i, walk, j, *_):
        again = jax.lax.max(j, jnp.int32(plan.resident))
        again = jax.lax.min(again, jnp.int32(plan.blocks_k - 1))
        return b, k, jax.lax.select((i == 0) & (walk == 0), j, again), 0

    def column(b, k, i, walk, j, *_):
        if plan.whole:
            return b, jax.lax.div(k, jnp.int32(plan.together)), 0, 0
        # The walk of the sums is the last one: blocks wait for it at the first.
        return b, k, 0, jax.lax.select(walk == int(not plan.given), j, jnp.int32(0))

    row = pl.BlockSpec((1, 1, groups, block_q), lambda b, k, i, *_: (b, k, 0, i))
    in_specs = [
        pl.BlockSpec((1, 1, groups, block_q, d), lambda b, k, i, *_: (b, k, 0, i, 0)),
        pl.BlockSpec((1, 1, block_k, d), fetched),
        pl.BlockSpec((1, 1, block_q), lambda b, k, i, *_: (b, 0, i)),
        pl.BlockSpec((1, plan.blocks_k, block_k), lambda b, *_: (b, 0, 0)),
        *[row] * rows,
    ]
    heads = plan.together * groups
    columns = jax.ShapeDtypeStruct((b, kv_heads // plan.together, heads, wide), "f4")
    out = pl.BlockSpec((1, 1, heads, wide if plan.whole else block_k), column)
    out_specs, shapes = [out, out], [columns, columns]
    if plan.slash:
        lanes = tpu_kernels.skewed_lanes(plan) + plan.queries + wide
        every = (groups, -(-lanes // LANES), LANES)
        along = pl.BlockSpec((1, 1, *every), lambda b, k, *_: (b, k, 0, 0, 0))
        out_specs.append(along)
        shapes.append(jax.ShapeDtypeStruct((b, kv_heads, *every), jnp.float32))
    return in_specs, out_specs, shapes
