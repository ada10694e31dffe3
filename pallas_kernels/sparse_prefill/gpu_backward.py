"""The gradient of `sparse_prefill` on Hopper: dq here, dk and dv in `gpu_keys`.

The kernel for dq walks the lists as the forward kernel does, 64 keys at a time: logits
and their gradients, of 64 queries each, then fit the registers beside dq.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from kvjax.pallas_kernels import compat
from kvjax.pallas_kernels.sparse_prefill.args import SparseArgs
from kvjax.pallas_kernels.sparse_prefill.gpu_keys import key_gradients
from kvjax.pallas_kernels.sparse_prefill.gpu_plan import (
    LOG2E,
    ROWS,
    Plan,
    copy_blocks,
    last_block,
    make_lists,
    make_plan,
    operands,
)

FAR_LSE = 1e30  # of rows that see nothing: exp2(x - 1e30) is 0, inf - inf is not


def backward(args: SparseArgs, d_out, lse, delta, how) -> tuple[Array, Array, Array]:
    """`(dq, dk, dv)`; see `gradient.with_gradient`."""
    plan = make_plan(args, *how)
    lse = jnp.where(jnp.isinf(lse), FAR_LSE, lse * LOG2E)
    more = [(0, 0), (0, 0), (0, plan.tiles * plan.rows - plan.lay.tokens)]
    lse = jnp.pad(lse, more, constant_values=FAR_LSE)
    rows = (args.q, d_out, lse, jnp.pad(delta, more))
    scalars = (args.q_start, args.kv_len)
    lists, stored = make_lists(plan, args), (args.k, args.v)
    keys = (*stored, *(last_block(plan, x, args.kv_len) for x in stored))
    dq = _query_gradient(plan, rows, keys, lists, scalars)
    return (dq, *key_gradients(plan, args.pattern, rows, keys, scalars))


def _query_gradient(plan: Plan, rows, keys, lists, scalars) -> Array:
    lay = plan.lay
    column = plgpu.SMEM((plan.groups, ROWS), jnp.float32)
    staged = operands(plan, plan.groups, ROWS, ROWS)

    def entry(*refs):
        free = plgpu.Barrier(num_arrivals=plan.groups, num_barriers=plan.stages)
        ready = plgpu.Barrier(num_barriers=plan.stages)
        mine = operands(plan, plan.groups, ROWS)
        blocks = operands(plan, plan.stages, lay.block_k)
        pl.run_scoped(
            lambda *scratch: _kernel(*refs, scratch=scratch, plan=plan),
            (mine, mine, column, column, *([staged] if plan.interpret else [])),
            (blocks, blocks),
            plgpu.Barrier(num_arrivals=4, num_barriers=plan.groups),
            (ready, ready),
            (free, free),
            collective_axes="wg",
        )

    return plgpu.kernel(
        entry,
        out_type=jax.ShapeDtypeStruct(rows[0].shape, rows[0].dtype),
        grid=(lay.heads, plan.tiles, lay.batch),
        grid_names=("heads", "tiles", "batch"),
        num_threads=plan.groups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=compat.gpu_interpret(plan.interpret),
    )(*rows, *keys, *lists, *scalars)


def _kernel(
    q_ref,  # [B, H, T, D] GMEM
    d_ref,  # [B, H, T, D] GMEM
    lse_ref,  # [B, H, tiles * rows] GMEM, base 2
    delta_ref,  # [B, H, tiles * rows] GMEM
    k_ref,  # [B, K, S, D] GMEM
    v_ref,  # [B, K, S, D] GMEM
    k_tail_ref,  # [B, K, block_k, D] GMEM: the last block of k, free slots cleared
    v_tail_ref,  # [B, K, block_k, D] GMEM: and of v
    index_ref,  # [B, Hx, N, C] GMEM
    count_ref,  # [B, Hx, Nq] GMEM
    start_ref,  # [B] GMEM
    len_ref,  # [B] GMEM
    dq_ref,  # [B, H, T, D] GMEM
    *,
    scratch,
    plan: Plan,
):
    lay, rules = plan.lay, plan.rules
    mine, (v_near, k_near), here, (v_here, k_here), (v_free, k_free) = scratch
    q_near, d_near, lse_near, delta_near, *staged = mine
    batch, head, group = map(lax.axis_index, ("batch", "heads", "wg"))
    tile = plan.tiles - 1 - lax.axis_index("tiles")  # the longest rows first
    block = lax.div(tile * plan.rows, jnp.int32(lay.block_q))
    listed = lax.div(head * plan.lists, jnp.int32(lay.heads))
    start, kv_len = start_ref[batch], len_ref[batch]
    count = count_ref[batch, listed, block]
    line = block if lay.per_block else 0
    base = lax.div(start, jnp.int32(lay.block_k)) + block

    def entry(e):
        """KV block `e` of the list; any block of the cache for one outside of it."""
        j = index_ref[batch, listed, line, e]
        j = base - j if plan.diagonals else j
        ok = (j >= 0) & (j < lay.kv_blocks)
        return jnp.where(ok, j, 0), ok

    @pl.when(group < plan.groups)
    def _():
        plgpu.set_max_registers(232, action="increase")
        first = tile * plan.rows + group * ROWS
        rows = (batch, head, pl.ds(first, ROWS))
        for ref, near in (
            (q_ref, q_near),
            (d_ref, d_near),
            (lse_ref, lse_near),
            (delta_ref, delta_near),
        ):
            plgpu.copy_gmem_to_smem(ref.at[rows], near.at[group], here.at[group])
        plgpu.barrier_wait(here.at[group])
        tall = plgpu.Layout.WGMMA.reduce(1)
        lse = plgpu.load(lse_near.at[group], layout=tall)
        delta = plgpu.load(delta_near.at[group], layout=tall)
        shape = (ROWS, ROWS)

        def step(e, dq):
            slot = lax.rem(e, jnp.int32(plan.stages))
            j, ok = entry(e)
            plgpu.barrier_wait(v_here.at[slot])
            plgpu.barrier_wait(k_here.at[slot])
            for part in range(0, lay.block_k, ROWS):
                keys = k_near.at[slot, pl.ds(part, ROWS)]
                values = v_near.at[slot, pl.ds(part, ROWS)]
                found = plan.product(q_near.at[group], keys.transpose((1, 0)))
                scores, bend = plan.logits(found)
                weight = jnp.exp2(scores - lax.broadcast_in_dim(lse, shape, [0]))
                q0, k0 = start + first, j * lay.block_k + part

                def masked(x, q0=q0, k0=k0, ok=ok):
                    layout = plgpu.Layout.WGMMA
                    q = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
                    k = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
                    limit = jnp.where(ok, kv_len, 0)
                    return jnp.where(rules.visible(q + q0, k + k0, limit), x, 0.0)

                covered = ok & rules.covers(q0, ROWS, k0, ROWS, kv_len)
                weight = lax.cond(covered, lambda x: x, masked, weight)
                slope = plan.product(d_near.at[group], values.transpose((1, 0)))
                slope = weight * (slope - lax.broadcast_in_dim(delta, shape, [0]))
                slope = slope if bend is None else slope * bend
                to = staged[0].at[group] if staged else None
                dq = plan.accumulate(dq, slope.astype(plan.dtype), keys, to)
            plgpu.barrier_arrive(v_free.at[slot])
            plgpu.barrier_arrive(k_free.at[slot])
            return dq

        zero = jnp.full((ROWS, lay.dim), 0.0, jnp.float32)
        zero = plgpu.layout_cast(zero, plgpu.Layout.WGMMA)
        dq = lax.fori_loop(0, count, step, zero)
        q_near.at[group][...] = (dq * rules.scale).astype(plan.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_near.at[group], dq_ref.at[rows])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(group == plan.groups)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        kv_head = lax.div(head, jnp.int32(lay.heads // lay.kv_heads))
        last = lax.div(kv_len, jnp.int32(lay.block_k))  # the block with free slots
        at = (batch, kv_head)
        sources = tuple(
            (ref.at[at], tail.at[at])
            for ref, tail in ((v_ref, v_tail_ref), (k_ref, k_tail_ref))
        )

        def block_of(e):
            return entry(e)[0]

        ready, free = (v_here, k_here), (v_free, k_free)
        copy_blocks(plan, count, block_of, last, sources, (v_near, k_near), ready, free)
