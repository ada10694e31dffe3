"""Normalisers, then column and diagonal sums, tile by tile: the Mosaic TPU kernels.

Two passes over the keys: the first keeps a running log-sum-exp per query, the second
sums the normalised weights of each tile over its queries. Tiles that no query of a
block sees cost no arithmetic.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kvjax.pallas_kernels import compat, gradients, tuning
from kvjax.pallas_kernels.column_stats import tpu_kernels, xla
from kvjax.pallas_kernels.column_stats.diagonals import by_distance, in_line, start
from kvjax.pallas_kernels.column_stats.stats import ColumnStats

LANES = tpu_kernels.LANES
FAR = jnp.iinfo(jnp.int32).max


class Plan(NamedTuple):
    """Static sizes and settings of one call."""

    block_q: int
    block_k: int
    queries: int
    scale: float
    window: int | None
    softcap: float | None
    interpret: Any


def column_stats(
    q: Float[Array, "B H T D"],
    keys: Float[Array, "B K S D"],
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    weights: Float[Array, "B H T"] | None = None,
    slash: bool = False,
    tiles: Mapping[str, Any] | None = None,
    interpret: bool = False,
) -> ColumnStats:
    """See `api.column_stats`."""
    if q.dtype == jnp.float16:
        raise NotImplementedError("column_stats: TPUs hold no float16; use bfloat16.")
    (b, h, t, _), s = q.shape, keys.shape[2]
    weights = jnp.ones((b, h, t), jnp.float32) if weights is None else weights
    sizes = tuning.tiles("column_stats", None, tiles)
    block_q = _block(t, sizes["block_q"], 8)
    plan = Plan(
        block_q=block_q,
        block_k=_block(s, sizes["block_k"], 1),
        queries=-(-t // block_q) * block_q,
        scale=scale,
        window=window,
        softcap=softcap,
        interpret=compat.tpu_interpret(interpret),
    )

    def plain(q, keys, q_positions, k_positions, weights, slash=slash):
        how = {"scale": scale, "window": window, "softcap": softcap, "slash": slash}
        return xla.column_stats(
            q, keys, q_positions, k_positions, weights=weights, **how
        )

    def kernel(*arrays):
        if not slash:
            return _run(plan, *arrays, slash=False)
        straight = in_line(arrays[2], arrays[3])
        return jax.lax.cond(
            straight, functools.partial(_run, plan, slash=True), plain, *arrays
        )

    return gradients.through(kernel, plain, q, keys, q_positions, k_positions, weights)


def _block(size: int, block: int, unit: int) -> int:
    """A multiple of the lanes, or all of a short axis rounded up to `unit`."""
    block = max(LANES, block // LANES * LANES)
    return block if size > block else -(-size // unit) * unit


def _run(plan, q, keys, q_positions, k_positions, weights, *, slash: bool):
    b, h, t, d = q.shape
    kv_heads, s = keys.shape[1:3]
    more = (0, plan.queries - t)
    q = jnp.pad(q, [(0, 0), (0, 0), more, (0, 0)])
    at_q = jnp.pad(q_positions, [(0, 0), more], constant_values=-1)
    weights = jnp.pad(weights, [(0, 0), (0, 0), more])
    if slash:  # Backwards, so that diagonals go up with rows and columns.
        q, weights, at_q = jnp.flip(q, 2), jnp.flip(weights, 2), jnp.flip(at_q, 1)
    count = -(-s // plan.block_k)
    more_k = (0, count * plan.block_k - s)
    at_k = jnp.pad(k_positions, [(0, 0), more_k], constant_values=-1)
    bounds = _bounds(at_q, at_k, plan)
    q = q.reshape(b, kv_heads, h // kv_heads, plan.queries, d)
    weights = weights.reshape(q.shape[:-1])
    at_q, at_k = at_q[:, None], at_k[:, None]
    lse = _normalisers(plan, bounds, q, keys, at_q, at_k)
    sums, highest, along = _sums(
        plan, bounds, q, keys, at_q, at_k, lse, weights, slash=slash
    )
    if along is not None:
        along = along.reshape(b, h, -1)
        last = start(q_positions) + plan.queries - 1  # distance of the first diagonal
        along = by_distance(along, last, s)
    return ColumnStats(sums.reshape(b, h, s), highest.reshape(b, h, s), along)


def _bounds(at_q: Array, at_k: Array, plan: Plan) -> tuple[Array, ...]:
    """First and last live position of each block, `[B, blocks]`; none: not crossed."""

    def of(at, block):
        at = at.reshape(at.shape[0], -1, block)
        first = jnp.min(jnp.where(at >= 0, at, FAR), axis=-1)
        return first, jnp.max(at, axis=-1)

    return (*of(at_q, plan.block_q), *of(at_k, plan.block_k))


def _specs(plan: Plan, groups: int, d: int, order: Any):
    """Block specs of queries, keys and positions; `order` maps the grid to (i, j)."""

    def spec(shape, at):
        def index(row, head, x, y, *_):
            return at(row, head, *order(x, y))

        return pl.BlockSpec(shape, index)

    return spec, (
        spec((1, 1, groups, plan.block_q, d), lambda b, k, i, j: (b, k, 0, i, 0)),
        spec((1, 1, plan.block_k, d), lambda b, k, i, j: (b, k, j, 0)),
        spec((1, 1, plan.block_q), lambda b, k, i, j: (b, 0, i)),
        spec((1, 1, plan.block_k), lambda b, k, i, j: (b, 0, j)),
    )


def _normalisers(plan: Plan, bounds, q, keys, at_q, at_k) -> Array:
    b, kv_heads, groups, queries, d = q.shape
    spec, specs = _specs(plan, groups, d, lambda x, y: (x, y))
    row = spec((1, 1, groups, plan.block_q), lambda b, k, i, j: (b, k, 0, i))
    state = pltpu.VMEM((groups, plan.block_q, 1), jnp.float32)
    return pl.pallas_call(
        functools.partial(tpu_kernels.normalisers, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            # rows, KV heads, query blocks, key blocks
            grid=(b, kv_heads, queries // plan.block_q, at_k.shape[-1] // plan.block_k),
            in_specs=specs,
            out_specs=row,
            scratch_shapes=(state, state),
        ),
        out_shape=jax.ShapeDtypeStruct((b, kv_heads, groups, queries), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=plan.interpret,
        name="kv_column_stats_normalisers",
    )(*bounds, q, keys, at_q, at_k)


def _sums(plan: Plan, bounds, q, keys, at_q, at_k, lse, weights, *, slash: bool):
    b, kv_heads, groups, queries, d = q.shape
    s = keys.shape[2]
    spec, specs = _specs(plan, groups, d, lambda x, y: (y, x))
    row = spec((1, 1, groups, plan.block_q), lambda b, k, i, j: (b, k, 0, i))
    column = spec((1, 1, groups, plan.block_k), lambda b, k, i, j: (b, k, 0, j))
    columns = jax.ShapeDtypeStruct((b, kv_heads, groups, s), jnp.float32)
    outs, shapes = [column, column], [columns, columns]
    if slash:
        wide = tpu_kernels.skewed_lanes(plan) + queries + at_k.shape[-1]
        all_of = (groups, -(-wide // LANES), LANES)
        outs.append(spec((1, 1, *all_of), lambda b, k, i, j: (b, k, 0, 0, 0)))
        shapes.append(jax.ShapeDtypeStruct((b, kv_heads, *all_of), jnp.float32))
    found = pl.pallas_call(
        functools.partial(tpu_kernels.sums, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            # rows, KV heads, key blocks, query blocks
            grid=(b, kv_heads, at_k.shape[-1] // plan.block_k, queries // plan.block_q),
            in_specs=(*specs, row, row),
            out_specs=tuple(outs),
        ),
        out_shape=tuple(shapes),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(
                "parallel",
                "parallel",
                "arbitrary" if slash else "parallel",
                "arbitrary",
            )
        ),
        interpret=plan.interpret,
        name="kv_column_stats_sums",
    )(*bounds, q, keys, at_q, at_k, lse, weights)
    return found[0], found[1], found[2] if slash else None
