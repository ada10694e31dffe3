"""`sparse_prefill` on TPU: the forward kernel, and the gradient around it.

Scores are in base 2: `exp2` of `logit * log2(e)`, one factor for both.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kvjax.pallas_kernels import compat
from kvjax.pallas_kernels.partial import Partial
from kvjax.pallas_kernels.sparse_prefill.args import SparseArgs
from kvjax.pallas_kernels.sparse_prefill.gradient import with_gradient
from kvjax.pallas_kernels.sparse_prefill.tpu_reader import (
    LANES,
    LOG2E,
    Plan,
    Reader,
    by_lane,
    list_spec,
    lists,
    logits_of,
    make_plan,
)
from kvjax.types import NEG_INF

LOW = -0.7 * float(jnp.finfo(jnp.float32).max)  # no infinities: inf - inf is NaN


def _kernel(
    start_ref,  # [B] SMEM
    len_ref,  # [B] SMEM
    list_ref,  # [1, 1, 1 + C] SMEM
    q_ref,  # [1, 1, R, block_q, D]
    k_ref,  # [B, K, S, D] HBM
    v_ref,  # [B, K, S, D] HBM
    out_ref,  # [1, 1, R, block_q, D]
    lse_ref,  # [1, 1, 1, R, block_q]
    k_buffer,  # [2, columns, D]
    v_buffer,  # [2, columns, D]
    semaphores,  # [2, 2]
    peak_ref,  # [rows, 128], equal lanes
    total_ref,  # [rows, 128], equal lanes
    sum_ref,  # [rows, D]
    *,
    plan: Plan,
):
    rules, rows = plan.rules, plan.rows
    reader = Reader(
        plan,
        start_ref,
        len_ref,
        list_ref,
        (k_ref, v_ref),
        (k_buffer, v_buffer),
        semaphores,
    )
    peak_ref[...] = jnp.full(peak_ref.shape, LOW, jnp.float32)
    total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
    sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    def update(keys, values, starts):
        queries = q_ref[0, 0].reshape(rows, plan.dim)
        scores, _ = logits_of(plan.product(queries, keys[...], (1, 1)), rules)
        block = values[...]
        if starts is not None:
            mask = reader.seen(starts)
            block = reader.cleared(block, starts)
            scores = jnp.where(mask, scores, LOW)
        peak = peak_ref[...][:, :1]
        top = jnp.maximum(peak, jnp.max(scores, axis=1, keepdims=True))
        weight = jnp.exp2(scores - top)
        if starts is not None:  # a row that has seen nothing yet has top = LOW
            weight = jnp.where(mask, weight, 0.0)
        shrink = jnp.exp2(peak - top)
        total = total_ref[...][:, :1] * shrink
        total = total + jnp.sum(weight, axis=1, keepdims=True)
        more = plan.product(weight.astype(block.dtype), block, (1, 0))
        sum_ref[...] = sum_ref[...] * shrink + more
        peak_ref[...] = jnp.broadcast_to(top, peak_ref.shape)
        total_ref[...] = jnp.broadcast_to(total, total_ref.shape)

    reader.run(update)
    total = total_ref[...]
    safe = jnp.where(total > 0, total, 1.0)
    out = sum_ref[...] / safe[:, :1]
    out_ref[0, 0] = out.reshape(out_ref.shape[2:]).astype(out_ref.dtype)
    lse = jnp.where(total > 0, (peak_ref[...] + jnp.log2(safe)) / LOG2E, NEG_INF)
    for r in range(plan.lay.rows):
        lse_ref[0, 0, 0, r : r + 1, :] = by_lane(lse, plan, r)


def lse_size(lay) -> int:
    """Rows of all queries, padding too."""
    return lay.batch * lay.lists * lay.rows * lay.q_blocks * lay.block_q


def _forward(args: SparseArgs, how) -> Partial:
    q, k, pattern = args.q, args.k, args.pattern
    plan = make_plan(args, *how)
    lay = plan.lay
    queries = plan.pad_dim(lay.split_queries(q))
    keys, values = (plan.pad_dim(lay.pad_keys(x)) for x in (k, args.v))
    q_block = (1, 1, lay.rows, lay.block_q, plan.dim)
    q_spec = pl.BlockSpec(q_block, lambda b, h, i, *_: (b, h, 0, i, 0))
    lse_block = (1, 1, 1, lay.rows, lay.block_q)
    lse_spec = pl.BlockSpec(lse_block, lambda b, h, i, *_: (b, h, i, 0, 0))
    any_spec = pl.BlockSpec(memory_space=pl.ANY)
    lse_shape = (lay.batch, lay.lists, lay.q_blocks, lay.rows, lay.block_q)
    buffer = pltpu.VMEM((2, plan.columns, plan.dim), k.dtype)
    grid = (lay.batch, lay.lists, lay.q_blocks)  # row, list, query block
    out, lse = pl.pallas_call(
        lambda *refs: _kernel(*refs, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=[list_spec(plan), q_spec, any_spec, any_spec],
            out_specs=[q_spec, lse_spec],
            scratch_shapes=[
                buffer,
                buffer,
                pltpu.SemaphoreType.DMA((2, 2)),
                pltpu.VMEM((plan.rows, LANES), jnp.float32),
                pltpu.VMEM((plan.rows, LANES), jnp.float32),
                pltpu.VMEM((plan.rows, plan.dim), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(queries.shape, q.dtype),
            jax.ShapeDtypeStruct(lse_shape, jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 3,
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * lay.entries * plan.rows * lay.block_k * lay.dim,
            transcendentals=lay.entries * plan.rows * lay.block_k,
            # Each block that a list names is read for it; a full list of seen blocks.
            bytes_accessed=2 * lay.entries * lay.block_k * plan.dim * k.dtype.itemsize
            + 2 * queries.size * q.dtype.itemsize
            + 4 * (lse_size(lay) + lists(pattern).size),
        ),
        interpret=compat.tpu_interpret(plan.interpret),
        name="kv_sparse_prefill",
    )(args.q_start, args.kv_len, lists(pattern), queries, keys, values)
    out = lay.join_queries(out)[..., : lay.dim]
    lse = jnp.moveaxis(lse, 2, 3)
    lse = lse.reshape(lay.batch, lay.heads, -1)[:, :, : lay.tokens]
    return Partial(out, lse)


def _backward(*args):
    from kvjax.pallas_kernels.sparse_prefill import tpu_backward

    return tpu_backward.backward(*args)


_attend = with_gradient(_forward, _backward)


def sparse_prefill(
    args: SparseArgs,
    *,
    tiles: Mapping[str, int] | None = None,
    interpret: bool = False,
) -> Partial:
    """The public function on TPU; `tiles` is `columns`, the keys of a loop step.

    Raises:
        NotImplementedError: float16, or blocks that the tiles do not divide.
    """
    return _attend(args, (tuple(sorted((tiles or {}).items())), interpret))
