"""Bodies of the two Hopper kernels of `column_stats`.

Compute warp groups multiply 64 rows each; one more warp group copies what they walk
over to shared memory, some steps ahead. Both kernels reduce along rows, which stays
within four threads: rows are queries in the first, keys in the second.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kvjax.pallas_kernels.partial import cap

ROWS = 64
"""Rows of a warp group's product."""
LOG2E = 1.4426950408889634
LOW = -1e30
"""Stands for -inf in running maxima: differences of it stay numbers."""


def filled(value: float) -> Any:
    """A number per row of a product."""
    full = jnp.full((ROWS,), value, jnp.float32)
    return plgpu.layout_cast(full, plgpu.Layout.WGMMA.reduce(1))


def _logits(rows_ref, columns_ref, plan: Any) -> Any:
    """Logits in base 2 of all rows and columns."""

    def product(acc):
        plgpu.wgmma(acc, rows_ref, columns_ref.transpose((1, 0)))
        return acc[...]

    shape = (rows_ref.shape[0], columns_ref.shape[0])
    found = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
    if plan.softcap is None:
        return found * (plan.scale * LOG2E)
    return cap(found * plan.scale, plan.softcap) * LOG2E


def _seen(at_q, at_k, plan: Any) -> Any:
    seen = (at_k >= 0) & (at_k <= at_q)
    return seen if plan.window is None else seen & (at_q - at_k < plan.window)


def _row_wise(x, shape) -> Any:
    return lax.broadcast_in_dim(x, shape, [0])


def _column_wise(x, shape) -> Any:
    return lax.broadcast_in_dim(x, shape, [1])


def _tall(ref) -> Any:
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1))


def _wide(ref) -> Any:
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0))


def _ring(plan: Any, free, steps, copy) -> None:
    """Copy `steps` times, `copy(step, slot)`, as the compute warp groups make room."""

    @pl.loop(0, steps)
    def _(step):
        slot = lax.rem(step, jnp.int32(plan.stages))
        full = step >= plan.stages
        pl.when(full)(lambda: plgpu.barrier_wait(free.at[slot]))
        copy(step, slot)

    for slot in range(plan.stages):  # the interpreter wants every phase waited for
        pl.when(slot < steps)(functools.partial(plgpu.barrier_wait, free.at[slot]))


def normalisers(
    q_ref,  # [B, K, rows, D] GMEM, the padded queries of each head of a KV head
    k_ref,  # [B, K, S, D] GMEM
    at_q_ref,  # [B, queries] GMEM
    at_k_ref,  # [B, keys] GMEM
    low_ref,  # [B, tiles] GMEM, the first block of keys that a tile of queries sees
    high_ref,  # [B, tiles] GMEM, one behind the last
    out_ref,  # [B, K, splits, rows] GMEM
    *,
    q_near,  # [groups, 64, D]
    k_near,  # [stages, block_k, D]
    at_q_near,  # [groups, 64]
    at_k_near,  # [stages, block_k]
    out_near,  # [groups, 64]
    q_here,
    k_here,
    free,
    plan: Any,
):
    """Log-sum-exp in base 2 of every query over a part of the keys that it sees."""
    group, row, head = (lax.axis_index(name) for name in ("wg", "row", "head"))
    split = lax.axis_index("split")
    tile = plan.row_tiles - 1 - lax.axis_index("tile")  # the longest ones first
    low, high = low_ref[row, tile], high_ref[row, tile]
    each = lax.div(high - low + (plan.splits - 1), jnp.int32(plan.splits))
    first = low + split * each
    steps = jnp.maximum(jnp.minimum(each, high - first), 0)

    @pl.when(group < plan.groups)
    def _():
        plgpu.set_max_registers(plan.registers[0], action="increase")
        rows = (tile * plan.groups + group) * ROWS
        mine, here = q_near.at[group], q_here.at[group]
        at = lax.rem(rows, jnp.int32(plan.queries))
        plgpu.copy_gmem_to_smem(q_ref.at[row, head, pl.ds(rows, ROWS)], mine, here)
        plgpu.copy_gmem_to_smem(
            at_q_ref.at[row, pl.ds(at, ROWS)], at_q_near.at[group], here
        )
        plgpu.barrier_wait(here)
        at_q = _tall(at_q_near.at[group])
        shape = (ROWS, plan.block_k)

        def step(e, carry):
            peak, mass = carry
            slot = lax.rem(e, jnp.int32(plan.stages))
            plgpu.barrier_wait(k_here.at[slot])
            logits = _logits(mine, k_near.at[slot], plan)
            at_k = _wide(at_k_near.at[slot])
            plgpu.barrier_arrive(free.at[slot])
            seen = _seen(_row_wise(at_q, shape), _column_wise(at_k, shape), plan)
            logits = jnp.where(seen, logits, LOW)
            top = jnp.maximum(peak, logits.max(axis=1))
            weight = jnp.exp2(logits - _row_wise(top, shape))
            return top, mass * jnp.exp2(peak - top) + weight.sum(axis=1)

        peak, mass = lax.fori_loop(0, steps, step, (filled(LOW), filled(0.0)))
        # A row that has seen nothing has weighed all of its hidden keys alike.
        lse = peak + jnp.log2(jnp.where(peak > LOW / 2, mass, 1.0))
        out_near.at[group][...] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            out_near.at[group], out_ref.at[row, head, split, pl.ds(rows, ROWS)]
        )
        plgpu.wait_smem_to_gmem(0)

    @pl.when(group == plan.groups)
    def _():
        plgpu.set_max_registers(plan.registers[1], action="decrease")

        def copy(e, slot):
            some = pl.ds((first + e) * plan.block_k, plan.block_k)
            here = k_here.at[slot]
            plgpu.copy_gmem_to_smem(k_ref.at[row, head, some], k_near.at[slot], here)
            plgpu.copy_gmem_to_smem(at_k_ref.at[row, some], at_k_near.at[slot], here)

        _ring(plan, free, steps, copy)


def sums(
    q_ref,  # [B, K, rows, D] GMEM
    k_ref,  # [B, K, S, D] GMEM
    at_q_ref,  # [B, queries] GMEM
    at_k_ref,  # [B, keys] GMEM
    shift_ref,  # [B, K, rows] GMEM, lse in base 2 less log2 of the query's weight
    low_ref,  # [B, key tiles] GMEM, the first block of queries that sees a tile of keys
    high_ref,  # [B, key tiles] GMEM, one behind the last
    *refs,  # sum, max [B, K, G, keys] GMEM; slash: [B, K, G, keys / 64, queries + 64]
    k_near,  # [groups, 64, D]
    q_near,  # [stages, block_q, D]
    at_k_near,  # [groups, 64]
    at_q_near,  # [stages, block_q]
    shift_near,  # [stages, block_q]
    sum_near,  # [groups, G, 64]
    max_near,  # [groups, G, 64]
    k_here,
    q_here,
    free,
    skew_near: Any = None,  # slash: [groups, 64, 64 + block_q + 64]
    along_near: Any = None,  # slash: [groups, queries + 64]
    plan: Any,
):
    """Sums and maxima of the normalised weights of 64 keys, over all queries."""
    sum_ref, max_ref, *along_refs = refs
    group, row, head = (lax.axis_index(name) for name in ("wg", "row", "head"))
    tile = lax.axis_index("tile")  # the first keys are seen by most queries
    low = low_ref[row, tile]
    blocks = jnp.maximum(high_ref[row, tile] - low, 0)
    heads = sum_near.shape[1]
    per_head = plan.queries // plan.block_q
    shape = (ROWS, plan.block_q)

    @pl.when(group < plan.groups)
    def _():
        plgpu.set_max_registers(plan.registers[0], action="increase")
        keys = pl.ds((tile * plan.groups + group) * ROWS, ROWS)
        mine, here = k_near.at[group], k_here.at[group]
        plgpu.copy_gmem_to_smem(k_ref.at[row, head, keys], mine, here)
        plgpu.copy_gmem_to_smem(at_k_ref.at[row, keys], at_k_near.at[group], here)
        plgpu.barrier_wait(here)
        at_k = _tall(at_k_near.at[group])
        if along_refs:
            near, along = skew_near.at[group], along_near.at[group]
            near[...] = jnp.zeros(near.shape, jnp.float32)

        @pl.loop(0, heads)
        def _(one):
            if along_refs:
                along[...] = jnp.zeros(along.shape, jnp.float32)

            def step(e, carry):
                total, highest = carry
                slot = lax.rem(one * blocks + e, jnp.int32(plan.stages))
                plgpu.barrier_wait(q_here.at[slot])
                logits = _logits(mine, q_near.at[slot], plan)
                at_q, shift = _wide(at_q_near.at[slot]), _wide(shift_near.at[slot])
                plgpu.barrier_arrive(free.at[slot])
                seen = _seen(_column_wise(at_q, shape), _row_wise(at_k, shape), plan)
                weight = jnp.exp2(logits - _column_wise(shift, shape))
                weight = jnp.where(seen, weight, 0.0)
                highest = jnp.maximum(highest, weight.max(axis=1))
                if along_refs:
                    _add_diagonals(near, along, weight, (low + e) * plan.block_q)
                return total + weight.sum(axis=1), highest

            start = (filled(0.0), filled(0.0))
            total, highest = lax.fori_loop(0, blocks, step, start)
            sum_near.at[group, one][...] = total
            max_near.at[group, one][...] = highest
            if along_refs:
                plgpu.commit_smem()
                to = along_refs[0].at[row, head, one, tile * plan.groups + group]
                plgpu.copy_smem_to_gmem(along, to)
                plgpu.wait_smem_to_gmem(0)

        plgpu.commit_smem()
        for near, ref in ((sum_near, sum_ref), (max_near, max_ref)):
            plgpu.copy_smem_to_gmem(near.at[group], ref.at[row, head, :, keys])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(group == plan.groups)
    def _():
        plgpu.set_max_registers(plan.registers[1], action="decrease")

        def copy(e, slot):
            one, block = lax.div(e, blocks), lax.rem(e, blocks)
            at = (low + block) * plan.block_q
            rows = pl.ds(one * (per_head * plan.block_q) + at, plan.block_q)
            here = q_here.at[slot]
            plgpu.copy_gmem_to_smem(q_ref.at[row, head, rows], q_near.at[slot], here)
            plgpu.copy_gmem_to_smem(
                at_q_ref.at[row, pl.ds(at, plan.block_q)], at_q_near.at[slot], here
            )
            plgpu.copy_gmem_to_smem(
                shift_ref.at[row, head, rows], shift_near.at[slot], here
            )

        _ring(plan, free, heads * blocks, copy)


def _add_diagonals(near, along, weight, first) -> None:
    """Row `r`, column `c` of a tile goes to entry `first + c + r` of `along`.

    The tile lies between zeros. Each of 128 threads reads a column of it that moves
    by one from row to row.
    """
    columns = weight.shape[1]
    near.at[:, pl.ds(ROWS, columns)][...] = weight
    plgpu.commit_smem()  # all warps have written, and have read what was before

    def row_of(width):
        layout = plgpu.Layout.WG_STRIDED((width,), vec_size=1)

        def add(r, total):
            some = near.at[r, pl.ds(ROWS - r, width)]
            return total + plgpu.load(some, layout=layout)

        zero = plgpu.layout_cast(jnp.zeros((width,), jnp.float32), layout)
        return lax.fori_loop(0, ROWS, add, zero), layout

    total, layout = row_of(columns + ROWS)
    here = along.at[pl.ds(first, columns + ROWS)]
    here[...] = plgpu.load(here, layout=layout) + total
    plgpu.commit_smem()
