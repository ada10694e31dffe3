"""dk and dv of `sparse_prefill` on TPU: a grid step per KV block and list head.

Scores are transposed, `[block_k, block_q]`, so that `lse` and `delta` are rows and no
product needs a transpose.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kvjax.pallas_kernels import compat
from kvjax.pallas_kernels.sparse_prefill.patterns import (
    BlockList,
    Diagonals,
    Pattern,
)
from kvjax.pallas_kernels.sparse_prefill.tpu_reader import (
    LANES,
    Plan,
    lists,
    logits_of,
)
from kvjax.pallas_kernels.sparse_prefill.transpose import columns, members, window_rows


class Walker:
    """The query blocks that read the grid step's KV block, one per loop step."""

    def __init__(
        self,
        plan: Plan,
        kind: type[Pattern],
        start_ref: Any,  # [B] SMEM
        len_ref: Any,  # [B] SMEM
        table_ref: Any,  # [1, 1, *] SMEM
        flat_ref: Any,  # [N, M, 1, 128] HBM
        window_ref: Any,  # [window_rows, 1, 128] SMEM
        window_semaphore: Any,
    ):
        self.plan, self.kind, self.table_ref = plan, kind, table_ref
        lay = plan.lay
        self.row, self.block = pl.program_id(0), pl.program_id(2)
        self.head = pl.program_id(1) * lay.group + pl.program_id(3)
        self.start, self.kv_len = start_ref[self.row], len_ref[self.row]
        self.k = self.block * lay.block_k
        if kind is BlockList:
            begin, end = table_ref[0, 0, self.block], table_ref[0, 0, self.block + 1]
            row = self.row * (lay.lists if lay.own else 1)
            row = row + (self.head if lay.own else 0)
            top = begin // LANES
            source = flat_ref.at[row, pl.ds(top, window_rows(lay))]
            copy = pltpu.make_async_copy(source, window_ref, window_semaphore)
            copy.start()
            copy.wait()
            self.window_ref, self.offset = window_ref, begin - top * LANES
            self.count = end - begin
        elif kind is Diagonals:
            self.base = self.block - self.start // lay.block_k
            self.count = jnp.minimum(table_ref[0, 0, 0], lay.capacity)
        else:
            self.offset = jnp.int32(0)
            if plan.rules.causal:  # earlier query blocks see nothing of this one
                self.offset = jnp.maximum(self.k - self.start, 0) // lay.block_q
            left = jnp.maximum(lay.q_blocks - self.offset, 0)
            self.count = jnp.where(table_ref[0, 0, self.block] > 0, left, 0)

    def entry(self, e: Any) -> tuple[Any, Any, Any]:
        """Query block `e`; whether it sees any key of the KV block, and all of them."""
        lay, rules = self.plan.lay, self.plan.rules
        if self.kind is BlockList:
            at = self.offset + jnp.minimum(e, self.count - 1)
            block = self.window_ref[at // LANES, 0, jax.lax.rem(at, LANES)]
        elif self.kind is Diagonals:
            block = self.base + self.table_ref[0, 0, 1 + e]
        else:
            block = self.offset + e
        ok = (block >= 0) & (block < lay.q_blocks)
        q = self.start + block * lay.block_q
        args = (q, lay.block_q, self.k, lay.block_k, self.kv_len)
        return block, ok & rules.touches(*args), ok & rules.covers(*args)

    def run(
        self,
        copies: Callable[[Any, Any], list[Any]],
        update: Callable[[Any, Any, bool], None],
    ) -> None:
        """Copy ahead and call `update(query block, slot, whether to mask)`."""

        def each(e, slot, start: bool):
            block, ok, _ = self.entry(e)

            @pl.when(ok)
            def _():
                for copy in copies(block, slot):
                    copy.start() if start else copy.wait()

        @pl.when(self.count > 0)
        def _():
            each(0, 0, True)

        def step(e, _):
            slot = jax.lax.rem(e, 2)

            @pl.when(e + 1 < self.count)
            def _():
                each(e + 1, 1 - slot, True)

            each(e, slot, False)
            block, ok, full = self.entry(e)
            pl.when(full)(lambda: update(block, slot, False))
            pl.when(ok & jnp.logical_not(full))(lambda: update(block, slot, True))
            return 0

        jax.lax.fori_loop(0, self.count, step, 0)

    def seen(self, block: Any) -> Array:
        """The mask `[block_k, block_q]` against one query block."""
        lay = self.plan.lay
        shape = (lay.block_k, lay.block_q)
        q = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        k = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        first = self.start + block * lay.block_q
        return self.plan.rules.visible(first + q, self.k + k, self.kv_len)


def _kernel(
    start_ref,  # [B] SMEM
    len_ref,  # [B] SMEM
    table_ref,  # [1, 1, *] SMEM
    k_ref,  # [1, 1, block_k, D]
    v_ref,  # [1, 1, block_k, D]
    flat_ref,  # [N, M, 1, 128] HBM
    q_ref,  # [B, lists, R, T, D] HBM
    d_ref,  # [B, lists, R, T, D] HBM
    stats_ref,  # [B, lists, q_blocks, 2 R, block_q] HBM
    dk_ref,  # [1, 1, block_k, D]
    dv_ref,  # [1, 1, block_k, D]
    window_ref,  # [window_rows, 1, 128] SMEM
    window_semaphore,
    q_buffer,  # [2, R, block_q, D]
    d_buffer,  # [2, R, block_q, D]
    stats_buffer,  # [2, 2 R, block_q]
    semaphores,  # [3, 2]
    dk_sum,  # [block_k, D]
    dv_sum,  # [block_k, D]
    *,
    plan: Plan,
    kind: type[Pattern],
):
    lay = plan.lay
    walker = Walker(
        plan,
        kind,
        start_ref,
        len_ref,
        table_ref,
        flat_ref,
        window_ref,
        window_semaphore,
    )

    @pl.when(pl.program_id(3) == 0)
    def _():
        dk_sum[...] = jnp.zeros(dk_sum.shape, jnp.float32)
        dv_sum[...] = jnp.zeros(dv_sum.shape, jnp.float32)

    def copies(block, slot):
        tokens = pl.ds(pl.multiple_of(block * lay.block_q, lay.block_q), lay.block_q)
        moves = (
            (q_ref.at[walker.row, walker.head, :, tokens], q_buffer),
            (d_ref.at[walker.row, walker.head, :, tokens], d_buffer),
            (stats_ref.at[walker.row, walker.head, block], stats_buffer),
        )
        return [
            pltpu.make_async_copy(source, to.at[slot], semaphores.at[n, slot])
            for n, (source, to) in enumerate(moves)
        ]

    def update(block, slot, masked):
        keys, values = k_ref[0, 0], v_ref[0, 0]
        stats = stats_buffer[slot]
        mask = walker.seen(block) if masked else None
        for r in range(lay.rows):
            queries, d_rows = q_buffer[slot, r], d_buffer[slot, r]
            lse, delta = stats[r : r + 1], stats[lay.rows + r : lay.rows + r + 1]
            scores, bend = logits_of(plan.product(keys, queries, (1, 1)), plan.rules)
            weight = jnp.exp2(scores - lse)
            slope = weight * (plan.product(values, d_rows, (1, 1)) - delta)
            slope = slope if bend is None else slope * bend
            if mask is not None:
                weight = jnp.where(mask, weight, 0.0)
                slope = jnp.where(mask, slope, 0.0)
            dv_sum[...] += plan.product(weight.astype(d_rows.dtype), d_rows, (1, 0))
            dk_sum[...] += plan.product(slope.astype(queries.dtype), queries, (1, 0))

    walker.run(copies, update)

    @pl.when(pl.program_id(3) == lay.group - 1)
    def _():
        dk_ref[0, 0] = (dk_sum[...] * plan.rules.scale).astype(dk_ref.dtype)
        dv_ref[0, 0] = dv_sum[...].astype(dv_ref.dtype)


def key_gradients(
    plan: Plan, pattern: Pattern, rows, stored, scalars
) -> tuple[Array, Array]:
    """`(dk, dv)` `[B, K, kv_blocks * block_k, D]`; arguments as the dq kernel's."""
    lay, (queries, d_rows, _), keys = plan.lay, rows, stored[0]
    flat = jnp.zeros((1, window_rows(lay), 1, LANES), jnp.int32)
    if isinstance(pattern, BlockList):
        table, flat = columns(pattern, lay)
    else:
        diagonal = isinstance(pattern, Diagonals)
        table = lists(pattern) if diagonal else members(pattern, lay)

    def table_index(b, h, j, g, *_):
        return (b * lay.lists + h * lay.group + g) if lay.own else b, 0, 0

    smem = pltpu.MemorySpace.SMEM
    table_spec = pl.BlockSpec((1, 1, table.shape[-1]), table_index, memory_space=smem)
    block = (1, 1, lay.block_k, plan.dim)
    spec = pl.BlockSpec(block, lambda b, h, j, g, *_: (b, h, j, 0))
    any_spec = pl.BlockSpec(memory_space=pl.ANY)
    buffer = (2, lay.rows, lay.block_q, plan.dim)
    item = queries.dtype.itemsize
    return pl.pallas_call(
        lambda *refs: _kernel(*refs, plan=plan, kind=type(pattern)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            # row, KV head, KV block, list of the KV head
            grid=(lay.batch, lay.kv_heads, lay.kv_blocks, lay.group),
            in_specs=[table_spec, spec, spec, *[any_spec] * 4],
            out_specs=[spec, spec],
            scratch_shapes=[
                pltpu.SMEM((window_rows(lay), 1, LANES), jnp.int32),
                pltpu.SemaphoreType.DMA(()),
                pltpu.VMEM(buffer, queries.dtype),
                pltpu.VMEM(buffer, d_rows.dtype),
                pltpu.VMEM((2, 2 * lay.rows, lay.block_q), jnp.float32),
                pltpu.SemaphoreType.DMA((3, 2)),
                pltpu.VMEM(block[2:], jnp.float32),
                pltpu.VMEM(block[2:], jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(keys.shape, keys.dtype)] * 2,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 3 + ("arbitrary",),
        ),
        cost_estimate=pl.CostEstimate(
            flops=8 * lay.entries * plan.rows * lay.block_k * plan.dim,
            transcendentals=lay.entries * plan.rows * lay.block_k,
            # Queries and their gradient, lse and delta, for each block that names them.
            bytes_accessed=lay.entries * plan.rows * (2 * plan.dim * item + 8)
            + 4 * (keys.size * keys.dtype.itemsize + table.size + flat.size),
        ),
        interpret=compat.tpu_interpret(plan.interpret),
        name="kv_sparse_prefill_dkv",
    )(*scalars, table, *stored, flat, *rows)
