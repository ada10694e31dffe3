"""`sparse_prefill` on Hopper: FlashAttention over lists, one warp group copies.

A thread block has one or two compute warp groups of 64 query rows, and one that copies
the listed KV blocks to shared memory some steps ahead. The gradient is that of
`gpu_backward`.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kvjax.pallas_kernels import compat
from kvjax.pallas_kernels.partial import Partial
from kvjax.pallas_kernels.sparse_prefill.args import SparseArgs
from kvjax.pallas_kernels.sparse_prefill.gpu_backward import backward
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
from kvjax.pallas_kernels.sparse_prefill.gradient import with_gradient
from kvjax.types import NEG_INF

# No infinity, since inf - inf is NaN; a power of two, since a fused multiply-add would
# leave the rounding error of another number's product: 1e22, of which exp2 is infinite.
LOW = -(2.0**100)


def _kernel(
    q_ref,  # [B, H, T, D] GMEM
    k_ref,  # [B, K, S, D] GMEM
    v_ref,  # [B, K, S, D] GMEM
    tail_ref,  # [B, K, block_k, D] GMEM: the last block of v, free slots cleared
    index_ref,  # [B, Hx, N, C] GMEM
    count_ref,  # [B, Hx, Nq] GMEM
    start_ref,  # [B] GMEM
    len_ref,  # [B] GMEM
    out_ref,  # [B, H, T, D] GMEM
    lse_ref,  # [B, H, tiles * rows] GMEM
    *,
    scratch,
    plan: Plan,
):
    lay, rules = plan.lay, plan.rules
    buffers, (q_ready, k_ready, v_ready), (k_free, v_free) = scratch
    q_smem, k_smem, v_smem, lse_smem, *staged = buffers
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
        mine, mine_lse = q_smem.at[group], lse_smem.at[group]
        rows = pl.ds(first, ROWS)
        plgpu.copy_gmem_to_smem(q_ref.at[batch, head, rows], mine, q_ready.at[group])
        plgpu.barrier_wait(q_ready.at[group])

        def column(value):
            full = jnp.full((ROWS,), value, jnp.float32)
            return plgpu.layout_cast(full, plgpu.Layout.WGMMA.reduce(1))

        def step(e, carry):
            out, peak, total = carry
            slot = lax.rem(e, jnp.int32(plan.stages))
            j, ok = entry(e)
            plgpu.barrier_wait(k_ready.at[slot])
            shape = (ROWS, lay.block_k)
            scores = plan.product(mine, k_smem.at[slot].transpose((1, 0)))
            plgpu.barrier_arrive(k_free.at[slot])
            if rules.softcap is not None:
                scores = jnp.tanh(scores * (rules.scale / rules.softcap))
            q0, k0 = start + first, j * lay.block_k

            def masked(x):
                layout = plgpu.Layout.WGMMA
                q = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) + q0
                k = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout) + k0
                limit = jnp.where(ok, kv_len, 0)
                return jnp.where(rules.visible(q, k, limit), x, LOW)

            covered = ok & rules.covers(q0, ROWS, k0, lay.block_k, kv_len)
            scores = lax.cond(covered, lambda x: x, masked, scores)
            top = jnp.maximum(peak, scores.max(axis=1))
            shrink = jnp.exp2((peak - top) * plan.factor)
            across = lax.broadcast_in_dim(top * plan.factor, shape, [0])
            weight = jnp.exp2(scores * plan.factor - across)
            total = total * shrink + weight.sum(axis=1)
            weight = weight.astype(plan.dtype)
            if plan.interpret:  # the interpreter multiplies from shared memory only
                staged[0][group] = weight
                plgpu.commit_smem()
                weight = staged[0].at[group]
            plgpu.barrier_wait(v_ready.at[slot])

            # Not accumulated in place: the rescaling becomes a fused multiply-add.
            more = plan.product(weight, v_smem.at[slot])
            plgpu.barrier_arrive(v_free.at[slot])
            out = out * lax.broadcast_in_dim(shrink, out.shape, [0]) + more
            return out, top, total

        zero = jnp.full((ROWS, lay.dim), 0.0, jnp.float32)
        zero = plgpu.layout_cast(zero, plgpu.Layout.WGMMA)
        carry = (zero, column(LOW), column(0.0))
        out, peak, total = lax.fori_loop(0, count, step, carry)
        # A row that has seen nothing has weighed all of its hidden keys alike.
        seen = peak > LOW / 2
        safe = jnp.where(seen, total, 1.0)
        share = jnp.where(seen, 1.0 / safe, 0.0)
        out *= lax.broadcast_in_dim(share, out.shape, [0])
        lse = (peak * plan.factor + jnp.log2(safe)) * (1.0 / LOG2E)
        mine[...] = out.astype(plan.dtype)
        mine_lse[...] = jnp.where(seen, lse, NEG_INF)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine, out_ref.at[batch, head, rows])
        plgpu.copy_smem_to_gmem(mine_lse, lse_ref.at[batch, head, rows])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(group == plan.groups)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        kv_head = lax.div(head, jnp.int32(lay.heads // lay.kv_heads))
        last = lax.div(kv_len, jnp.int32(lay.block_k))  # the block with free slots
        at = (batch, kv_head)
        sources = ((k_ref.at[at], None), (v_ref.at[at], tail_ref.at[at]))

        def block_of(e):
            return entry(e)[0]

        ready, free = (k_ready, v_ready), (k_free, v_free)
        copy_blocks(plan, count, block_of, last, sources, buffers[1:3], ready, free)


def _forward(args: SparseArgs, how) -> Partial:
    q, k, v, kv_len = args.q, args.k, args.v, args.kv_len
    plan = make_plan(args, *how)
    lay = plan.lay
    index, counts = make_lists(plan, args)

    staged = operands(plan, plan.groups, ROWS, lay.block_k)

    def entry(*refs):
        free = plgpu.Barrier(num_arrivals=plan.groups, num_barriers=plan.stages)
        ready = plgpu.Barrier(num_barriers=plan.stages)
        pl.run_scoped(
            lambda *scratch: _kernel(*refs, scratch=scratch, plan=plan),
            (
                operands(plan, plan.groups, ROWS),
                operands(plan, plan.stages, lay.block_k),
                operands(plan, plan.stages, lay.block_k),
                plgpu.SMEM((plan.groups, ROWS), jnp.float32),
                *([staged] if plan.interpret else []),
            ),
            (plgpu.Barrier(num_barriers=plan.groups), ready, ready),
            (free, free),
            collective_axes="wg",
        )

    lse_shape = (lay.batch, lay.heads, plan.tiles * plan.rows)
    out, lse = plgpu.kernel(
        entry,
        out_type=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(lse_shape, jnp.float32),
        ],
        grid=(lay.heads, plan.tiles, lay.batch),
        grid_names=("heads", "tiles", "batch"),
        num_threads=plan.groups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=compat.gpu_interpret(plan.interpret),
    )(q, k, v, last_block(plan, v, kv_len), index, counts, args.q_start, kv_len)
    return Partial(out, lse[:, :, : lay.tokens])


_attend = with_gradient(_forward, backward)


def sparse_prefill(
    args: SparseArgs,
    *,
    tiles: Mapping[str, int] | None = None,
    interpret: bool = False,
) -> Partial:
    """The public function on Hopper; `tiles` is `stages`, KV blocks copied ahead.

    Raises:
        NotImplementedError: not bfloat16, D not 64 or 128, blocks that the tensor
            cores' tiles do not divide, a scale that is not positive.
    """
    tokens = args.q.shape[2]
    # Tiles in shared memory have 8 rows: other counts of tokens are copied.
    q, k, v = (
        jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % 8), (0, 0)])
        for x in (args.q, args.k, args.v)
    )
    args = dataclasses.replace(args, q=q, k=k, v=v)
    part = _attend(args, (tuple(sorted((tiles or {}).items())), interpret))
    return Partial(part.out[:, :, :tokens], part.lse[:, :, :tokens])
