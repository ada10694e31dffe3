"""dk and dv of `sparse_prefill` on Hopper: a thread block per (KV head, KV block).

Its compute warp groups own 64 keys each and walk the queries that list the block, 64
at a time, all query heads of the KV head one after the other, so that both sums stay
in registers. Keys are rows: nothing that a free key holds leaves its row.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from kvjax.pallas_kernels import compat
from kvjax.pallas_kernels.sparse_prefill.gpu_plan import (
    ROWS,
    Plan,
    copy_block,
    operands,
)
from kvjax.pallas_kernels.sparse_prefill.patterns import (
    BlockList,
    Diagonals,
    Pattern,
)
from kvjax.pallas_kernels.sparse_prefill.transpose import columns, members

FAR = jnp.iinfo(jnp.int32).max


def readers(
    plan: Plan, pattern: Pattern, q_start: Int[Array, "B"]
) -> tuple[Int[Array, "N X"], Int[Array, "N S"], Int[Array, "N S"]]:
    """Query blocks by KV block: entries, and where each KV block's begin and end.

    An entry of diagonals is an offset, from `kv block - q_start // block` on.
    """
    lay = plan.lay
    if isinstance(pattern, BlockList):
        starts, flat = columns(pattern, lay)
        starts = starts[:, 0]
        return flat.reshape(flat.shape[0], -1), starts[:, :-1], starts[:, 1:]
    j = jnp.arange(lay.kv_blocks, dtype=jnp.int32)
    start = jnp.repeat(q_start, plan.lists)[:, None]
    if isinstance(pattern, Diagonals):
        offsets = pattern.offsets.reshape(-1, lay.capacity)
        used = jnp.arange(lay.capacity) < pattern.counts.reshape(-1, 1)
        offsets = jnp.sort(jnp.where(used, offsets, FAR), axis=-1)
        base = j - start // lay.block_k
        # Larger offsets lie behind the last query block: these are in front.
        end = jax.vmap(jnp.searchsorted)(offsets, lay.q_blocks - base)
        return offsets, jnp.zeros_like(end, jnp.int32), end.astype(jnp.int32)
    begin = jnp.zeros_like(start + j)
    if plan.rules.causal:  # earlier query blocks see nothing of this one
        begin = jnp.maximum(j * lay.block_k - start, 0) // lay.block_q
    member = members(pattern, lay)[:, 0] > 0
    end = jnp.where(member, jnp.maximum(begin, lay.q_blocks), begin)
    every = jnp.arange(lay.q_blocks, dtype=jnp.int32)
    return jnp.broadcast_to(every, (start.shape[0], lay.q_blocks)), begin, end


def key_gradients(plan: Plan, pattern, rows, keys, scalars) -> tuple[Array, Array]:
    """`(dk, dv)` `[B, K, S, D]`; arguments as the dq kernel's."""
    lay, groups = plan.lay, plan.lay.block_k // ROWS
    stages = max(plan.stages, 2)
    stat = plgpu.SMEM((stages, ROWS), jnp.float32)
    staged = [operands(plan, groups, ROWS, ROWS)] * 2 if plan.interpret else []

    def entry(*refs):
        mine = operands(plan, groups, ROWS)
        queries = operands(plan, stages, ROWS)
        pl.run_scoped(
            lambda *scratch: _kernel(*refs, scratch=scratch, plan=plan),
            (mine, mine, *staged),
            (queries, queries, stat, stat),
            plgpu.Barrier(num_arrivals=2, num_barriers=groups),
            plgpu.Barrier(num_arrivals=4, num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            collective_axes="wg",
        )

    lists = readers(plan, pattern, scalars[0])
    return plgpu.kernel(
        entry,
        out_type=[
            jax.ShapeDtypeStruct(keys[0].shape, keys[0].dtype),
            jax.ShapeDtypeStruct(keys[1].shape, keys[1].dtype),
        ],
        grid=(lay.kv_heads, lay.kv_blocks, lay.batch),
        grid_names=("heads", "blocks", "batch"),
        num_threads=groups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=compat.gpu_interpret(plan.interpret),
    )(*rows, keys[0], keys[1], keys[3], *lists, *scalars)


def _kernel(
    q_ref,  # [B, H, T, D] GMEM
    d_ref,  # [B, H, T, D] GMEM
    lse_ref,  # [B, H, tiles * rows] GMEM, base 2
    delta_ref,  # [B, H, tiles * rows] GMEM
    k_ref,  # [B, K, S, D] GMEM
    v_ref,  # [B, K, S, D] GMEM
    tail_ref,  # [B, K, block_k, D] GMEM: the last block of v, free slots cleared
    entry_ref,  # [N, X] GMEM
    begin_ref,  # [N, kv_blocks] GMEM
    end_ref,  # [N, kv_blocks] GMEM
    start_ref,  # [B] GMEM
    len_ref,  # [B] GMEM
    dk_ref,  # [B, K, S, D] GMEM
    dv_ref,  # [B, K, S, D] GMEM
    *,
    scratch,
    plan: Plan,
):
    lay, rules = plan.lay, plan.rules
    (k_near, v_near, *staged), nears, mine_here, here, free = scratch
    q_near, d_near, lse_near, delta_near = nears
    groups, stages = k_near.shape[0], q_near.shape[0]
    batch, kv_head, group = map(lax.axis_index, ("batch", "heads", "wg"))
    j = lax.axis_index("blocks")  # the first blocks are read by most queries
    start, kv_len = start_ref[batch], len_ref[batch]

    each_tile = functools.partial(
        _each_tile, plan, (entry_ref, begin_ref, end_ref), start
    )

    @pl.when(group < groups)
    def _():
        plgpu.set_max_registers(240, action="increase")
        k0 = j * lay.block_k + group * ROWS
        keys = (batch, kv_head, pl.ds(k0, ROWS))
        mine = mine_here.at[group]
        plgpu.copy_gmem_to_smem(k_ref.at[keys], k_near.at[group], mine)
        ends = tail_ref.at[batch, kv_head, pl.ds(group * ROWS, ROWS)]
        at_end = j >= lax.div(kv_len, jnp.int32(lay.block_k))
        copy_block(v_ref.at[keys], ends, at_end, (v_near.at[group], mine))
        plgpu.barrier_wait(mine)
        shape = (ROWS, ROWS)

        def update(step, head, first, ok, sums):
            del head
            dk, dv = sums
            slot = lax.rem(step, jnp.int32(stages))
            plgpu.barrier_wait(here.at[slot])
            queries, d_rows = q_near.at[slot], d_near.at[slot]
            wide = plgpu.Layout.WGMMA.reduce(0)
            lse = plgpu.load(lse_near.at[slot], layout=wide)
            delta = plgpu.load(delta_near.at[slot], layout=wide)
            found = plan.product(k_near.at[group], queries.transpose((1, 0)))
            scores, bend = plan.logits(found)
            weight = jnp.exp2(scores - lax.broadcast_in_dim(lse, shape, [1]))
            q0 = start + first

            def masked(weight):
                layout = plgpu.Layout.WGMMA
                q = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout) + q0
                k = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) + k0
                seen = rules.visible(q, k, jnp.where(ok, kv_len, 0))
                return jnp.where(seen, weight, 0.0)

            covered = ok & rules.covers(q0, ROWS, k0, ROWS, kv_len)
            weight = lax.cond(covered, lambda x: x, masked, weight)
            to = [x.at[group] for x in staged] or (None, None)
            dv = plan.accumulate(dv, weight.astype(plan.dtype), d_rows, to[0])
            slope = plan.product(v_near.at[group], d_rows.transpose((1, 0)))
            slope = weight * (slope - lax.broadcast_in_dim(delta, shape, [1]))
            slope = slope if bend is None else slope * bend
            slope = jnp.where(weight > 0, slope, 0.0)  # 0 * NaN of a free key's logit
            dk = plan.accumulate(dk, slope.astype(plan.dtype), queries, to[1])
            plgpu.barrier_arrive(free.at[slot])
            return dk, dv

        zero = jnp.full((ROWS, lay.dim), 0.0, jnp.float32)
        zero = plgpu.layout_cast(zero, plgpu.Layout.WGMMA)
        _, (dk, dv) = each_tile(update, (zero, zero))
        k_near.at[group][...] = (dk * rules.scale).astype(plan.dtype)
        v_near.at[group][...] = dv.astype(plan.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_near.at[group], dk_ref.at[keys])
        plgpu.copy_smem_to_gmem(v_near.at[group], dv_ref.at[keys])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(group == groups)
    def _():
        plgpu.set_max_registers(24, action="decrease")

        def copy(step, head, first, ok, carry):
            del ok
            slot = lax.rem(step, jnp.int32(stages))
            full = step >= stages
            pl.when(full)(lambda: plgpu.barrier_wait(free.at[slot]))
            some = (batch, head, pl.ds(first, ROWS))
            refs = (q_ref, d_ref, lse_ref, delta_ref)
            for ref, near in zip(refs, nears, strict=True):
                plgpu.copy_gmem_to_smem(ref.at[some], near.at[slot], here.at[slot])
            return carry

        steps, _ = each_tile(copy, jnp.int32(0))
        for slot in range(stages):  # the interpreter wants every phase waited for
            wait: Any = functools.partial(plgpu.barrier_wait, free.at[slot])
            pl.when(slot < steps)(wait)


def _each_tile(plan: Plan, lists, start, body, carry):
    """Calls `body` for every 64 queries that list the block, head by head.

    Args:
        plan: sizes.
        lists: references to what `readers` returns.
        start: position of the first query.
        body: `(step, query head, first query, whether it exists, carry) -> carry`.
        carry: of the first call.

    Returns:
        The number of steps, and the last carry.
    """
    lay, (entry_ref, begin_ref, end_ref) = plan.lay, lists
    batch, kv_head, j = map(lax.axis_index, ("batch", "heads", "blocks"))
    base = j - lax.div(start, jnp.int32(lay.block_k)) if plan.diagonals else 0
    heads, per_block = lay.heads // lay.kv_heads, jnp.int32(lay.block_q // ROWS)

    def one_head(g, outer):
        done, carry = outer
        head = kv_head * heads + g
        n = batch * plan.lists + lax.div(head * plan.lists, jnp.int32(lay.heads))
        begin = begin_ref[n, j]
        tiles = jnp.maximum(end_ref[n, j] - begin, 0) * per_block

        def one_tile(e, carry):
            block = entry_ref[n, begin + lax.div(e, per_block)] + base
            ok = (block >= 0) & (block < lay.q_blocks)
            first = jnp.where(ok, block, 0) * lay.block_q + lax.rem(e, per_block) * ROWS
            ok = ok & (first < lay.tokens)  # a block may end behind the last query
            return body(done + e, head, jnp.where(ok, first, 0), ok, carry)

        return done + tiles, lax.fori_loop(0, tiles, one_tile, carry)

    return lax.fori_loop(0, heads, one_head, (jnp.int32(0), carry))
