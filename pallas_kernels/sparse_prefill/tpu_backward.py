"""The gradient of `sparse_prefill` on TPU: one kernel for dq, one for dk and dv.

The kernel for dq walks the lists as the forward kernel does. The one for dk and dv has
a grid step per KV block and walks the query blocks that list it, `transpose`; query
heads of one KV head follow each other, so that their sum stays in VMEM.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kvjax.pallas_kernels import compat
from kvjax.pallas_kernels.sparse_prefill.args import SparseArgs
from kvjax.pallas_kernels.sparse_prefill.tpu_keys import key_gradients
from kvjax.pallas_kernels.sparse_prefill.tpu_reader import (
    LANES,
    LOG2E,
    Plan,
    Reader,
    by_sublane,
    list_spec,
    lists,
    logits_of,
    make_plan,
)

FAR_LSE = 1e30  # of rows that see nothing: exp2(x - 1e30) is 0, inf - inf is not


def backward(args: SparseArgs, d_out, lse, delta, how) -> tuple[Array, Array, Array]:
    """`(dq, dk, dv)`; see `gradient.with_gradient`."""
    plan = make_plan(args, *how)
    lay = plan.lay
    queries, d_rows = (plan.pad_dim(lay.split_queries(x)) for x in (args.q, d_out))
    keys, values = (plan.pad_dim(lay.pad_keys(x)) for x in (args.k, args.v))
    lse = jnp.where(jnp.isinf(lse), FAR_LSE, lse * LOG2E)
    stats = jnp.concatenate(
        [_by_block(lse, plan, FAR_LSE), _by_block(delta, plan, 0.0)], axis=3
    )
    rows, stored = (queries, d_rows, stats), (keys, values)
    scalars = (args.q_start, args.kv_len)
    dq = _query_gradient(plan, rows, stored, lists(args.pattern), scalars)
    dk, dv = key_gradients(plan, args.pattern, rows, stored, scalars)
    return (
        lay.join_queries(dq)[..., : lay.dim],
        dk[:, :, : lay.slots, : lay.dim],
        dv[:, :, : lay.slots, : lay.dim],
    )


def _by_block(x: Array, plan: Plan, fill: float) -> Array:
    """`[B, H, T]` to `[B, lists, q_blocks, rows, block_q]`."""
    lay = plan.lay
    pad = lay.q_blocks * lay.block_q - lay.tokens
    x = jnp.pad(x, [(0, 0), (0, 0), (0, pad)], constant_values=fill)
    x = x.reshape(lay.batch, lay.lists, lay.rows, lay.q_blocks, lay.block_q)
    return jnp.moveaxis(x, 3, 2)


def _dq_kernel(
    start_ref,  # [B] SMEM
    len_ref,  # [B] SMEM
    list_ref,  # [1, 1, 1 + C] SMEM
    q_ref,  # [1, 1, R, block_q, D]
    d_ref,  # [1, 1, R, block_q, D]
    stats_ref,  # [1, 1, 1, 2 R, block_q]: lse in base 2, then delta
    k_ref,  # [B, K, S, D] HBM
    v_ref,  # [B, K, S, D] HBM
    dq_ref,  # [1, 1, R, block_q, D]
    k_buffer,  # [2, columns, D]
    v_buffer,  # [2, columns, D]
    semaphores,  # [2, 2]
    lse_ref,  # [rows, 128], equal lanes
    delta_ref,  # [rows, 128], equal lanes
    sum_ref,  # [rows, D]
    *,
    plan: Plan,
):
    rules, rows, r = plan.rules, plan.rows, plan.lay.rows
    reader = Reader(
        plan,
        start_ref,
        len_ref,
        list_ref,
        (k_ref, v_ref),
        (k_buffer, v_buffer),
        semaphores,
    )
    shape = (rows, LANES)
    lse_ref[...] = jnp.broadcast_to(by_sublane(stats_ref[0, 0, 0, :r], plan), shape)
    delta_ref[...] = jnp.broadcast_to(by_sublane(stats_ref[0, 0, 0, r:], plan), shape)
    sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    def update(keys, values, starts):
        queries = q_ref[0, 0].reshape(rows, plan.dim)
        d_rows = d_ref[0, 0].reshape(rows, plan.dim)
        block = keys[...]
        scores, bend = logits_of(plan.product(queries, block, (1, 1)), rules)
        slope = plan.product(d_rows, values[...], (1, 1)) - delta_ref[...][:, :1]
        slope = jnp.exp2(scores - lse_ref[...][:, :1]) * slope
        slope = slope if bend is None else slope * bend
        if starts is not None:
            slope = jnp.where(reader.seen(starts), slope, 0.0)
            block = reader.cleared(block, starts)
        sum_ref[...] += plan.product(slope.astype(block.dtype), block, (1, 0))

    reader.run(update)
    out = sum_ref[...] * rules.scale
    dq_ref[0, 0] = out.reshape(dq_ref.shape[2:]).astype(dq_ref.dtype)


def _query_gradient(plan: Plan, rows, stored, table, scalars) -> Array:
    lay, (queries, _, stats), keys = plan.lay, rows, stored[0]
    block = (1, 1, lay.rows, lay.block_q, plan.dim)
    spec = pl.BlockSpec(block, lambda b, h, i, *_: (b, h, 0, i, 0))
    stats_block = (1, 1, 1, 2 * lay.rows, lay.block_q)
    stats_spec = pl.BlockSpec(stats_block, lambda b, h, i, *_: (b, h, i, 0, 0))
    any_spec = pl.BlockSpec(memory_space=pl.ANY)
    buffer = pltpu.VMEM((2, plan.columns, plan.dim), keys.dtype)
    column = pltpu.VMEM((plan.rows, LANES), jnp.float32)
    named = 2 * lay.entries * lay.block_k * plan.dim  # of keys and values
    return pl.pallas_call(
        lambda *refs: _dq_kernel(*refs, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(lay.batch, lay.lists, lay.q_blocks),  # row, list, query block
            in_specs=[list_spec(plan), spec, spec, stats_spec, any_spec, any_spec],
            out_specs=spec,
            scratch_shapes=[
                buffer,
                buffer,
                pltpu.SemaphoreType.DMA((2, 2)),
                column,
                column,
                pltpu.VMEM((plan.rows, plan.dim), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(queries.shape, queries.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 3,
        ),
        cost_estimate=pl.CostEstimate(
            flops=6 * lay.entries * plan.rows * lay.block_k * plan.dim,
            transcendentals=lay.entries * plan.rows * lay.block_k,
            bytes_accessed=named * keys.dtype.itemsize
            + 3 * queries.size * queries.dtype.itemsize
            + 4 * (stats.size + table.size),
        ),
        interpret=compat.tpu_interpret(plan.interpret),
        name="kv_sparse_prefill_dq",
    )(*scalars, table, *rows, *stored)
