"""The loop of a TPU kernel over the KV blocks of one query block.

The grid has a step per (row, list, query block). Its list comes to SMEM as a block of
its own, so that a table of any size fits; its KV blocks are copied from HBM by hand,
several per step and one step ahead. Blocks that no query can see are never copied.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from kvjax.pallas_kernels import tuning
from kvjax.pallas_kernels.sparse_prefill.args import SparseArgs
from kvjax.pallas_kernels.sparse_prefill.layout import Layout, Rules, layout
from kvjax.pallas_kernels.sparse_prefill.patterns import Diagonals, Pattern, table

LANES = 128
FAR = 1 << 30  # position of a column that holds no key
LOG2E = 1.4426950408889634


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a kernel knows when it is traced."""

    lay: Layout
    rules: Rules
    diagonals: bool
    fetch: int  # KV blocks per step
    precision: Any  # of the products
    dim: int  # channels in the kernel, a multiple of 128 on the device
    interpret: bool

    @property
    def rows(self) -> int:
        """Query rows of a grid step."""
        return self.lay.rows * self.lay.block_q

    @property
    def columns(self) -> int:
        """Key columns of a loop step."""
        return self.fetch * self.lay.block_k

    def product(self, a: Array, b: Array, dims: tuple[int, int]) -> Array:
        """Product over one axis of each, in f32."""
        return jax.lax.dot_general(
            a,
            b,
            (((dims[0],), (dims[1],)), ((), ())),
            precision=self.precision,
            preferred_element_type=jnp.float32,
        )

    def pad_dim(self, x: Array) -> Array:
        """Zeros behind the channels: a copy by hand moves whole lanes."""
        pad = self.dim - x.shape[-1]
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)]) if pad else x


def make_plan(args: SparseArgs, tiles, interpret: bool) -> Plan:
    """The plan of a call.

    Raises:
        NotImplementedError: blocks that the hardware's tiles do not divide.
    """
    q, pattern = args.q, args.pattern
    lay = layout(q, args.k, pattern)
    tile = 32 // jnp.dtype(q.dtype).itemsize
    if q.dtype == jnp.float16:
        raise NotImplementedError("sparse_prefill: the TPU kernel has no float16.")
    if not interpret and (lay.block_q % tile or lay.block_k % LANES):
        raise NotImplementedError(
            f"sparse_prefill: the TPU kernel needs block_q a multiple of {tile} and "
            f"block_k of {LANES}; got {lay.block_q} and {lay.block_k}."
        )
    columns = tuning.tiles("sparse_prefill", given=dict(tiles))["columns"]
    fetch = max(1, min(columns // lay.block_k, lay.capacity))
    dim = lay.dim if interpret else -(-lay.dim // LANES) * LANES
    exact = q.dtype == jnp.float32
    return Plan(
        lay=lay,
        rules=args.rules,
        diagonals=isinstance(pattern, Diagonals),
        fetch=fetch,
        precision=jax.lax.Precision.HIGHEST if exact else None,
        dim=dim,
        interpret=interpret,
    )


def lists(pattern: Pattern) -> Int[Array, "N 1 C"]:
    """One row per list: its count, then its entries."""
    rows = jnp.concatenate([pattern.counts[..., None], table(pattern)], axis=-1)
    return rows.reshape(-1, 1, rows.shape[-1])


def list_spec(plan: Plan) -> pl.BlockSpec:
    """The list of a grid step `(b, h, i)`, in SMEM."""
    lay = plan.lay
    count = lay.lists if lay.own else 1

    def index(b, h, i, *_):
        row = b * count + (h if lay.own else 0)
        return (row * lay.q_blocks + i if lay.per_block else row), 0, 0

    return pl.BlockSpec(
        (1, 1, lay.capacity + 1), index, memory_space=pltpu.MemorySpace.SMEM
    )


class Reader:
    """Copies the KV blocks of the current grid step and calls back per loop step."""

    def __init__(
        self,
        plan: Plan,
        start_ref: Any,  # [B] SMEM
        len_ref: Any,  # [B] SMEM
        list_ref: Any,  # [1, 1, 1 + C] SMEM
        sources: Sequence[Any],  # k, v [B, K, S, D] HBM
        buffers: Sequence[Any],  # k, v [2, columns, D] VMEM
        semaphores: Any,  # [2, 2]
    ):
        self.plan, self.list_ref = plan, list_ref
        self.sources, self.buffers, self.semaphores = sources, buffers, semaphores
        lay = plan.lay
        self.row, self.block = pl.program_id(0), pl.program_id(2)
        self.kv_head = pl.program_id(1) // lay.group
        start = start_ref[self.row]
        self.kv_len = len_ref[self.row]
        self.first = start + self.block * lay.block_q
        self.base = start // lay.block_k + self.block
        self.count = jnp.minimum(list_ref[0, 0, 0], lay.capacity)

    def entry(self, e: Any) -> tuple[Any, Any, Any]:
        """First key of entry `e`; whether any query sees it; whether all see all."""
        lay, rules = self.plan.lay, self.plan.rules
        block = self.list_ref[0, 0, 1 + jnp.minimum(e, lay.capacity - 1)]
        block = self.base - block if self.plan.diagonals else block
        ok = (e < self.count) & (block >= 0) & (block < lay.kv_blocks)
        k = block * lay.block_k
        args = (self.first, lay.block_q, k, lay.block_k, self.kv_len)
        return k, ok & rules.touches(*args), ok & rules.covers(*args)

    def copies(self, step: Any, slot: Any, do: Callable[[Any], None]) -> None:
        """Start, or wait for, the copies of one loop step."""
        size = self.plan.lay.block_k
        for n in range(self.plan.fetch):
            k, ok, _ = self.entry(step * self.plan.fetch + n)
            k = pl.multiple_of(k, size)

            @pl.when(ok)
            def _(k=k, n=n):
                for t in range(2):
                    source = self.sources[t].at[self.row, self.kv_head, pl.ds(k, size)]
                    to = self.buffers[t].at[slot, pl.ds(n * size, size)]
                    semaphore = self.semaphores.at[t, slot]
                    do(pltpu.make_async_copy(source, to, semaphore))

    def run(self, update: Callable[[Any, Any, Any], None]) -> None:
        """Call `update(k block, v block, starts)` per loop step.

        `starts` is None where every query sees every column, otherwise the first
        position of each fetched block, `FAR` for those that were not copied.
        """
        plan = self.plan
        steps = pl.cdiv(self.count, plan.fetch)

        @pl.when(steps > 0)
        def _():
            self.copies(0, 0, lambda copy: copy.start())

        def step(n, _):
            slot = jax.lax.rem(n, 2)

            @pl.when(n + 1 < steps)
            def _():
                self.copies(n + 1, 1 - slot, lambda copy: copy.start())

            self.copies(n, slot, lambda copy: copy.wait())
            entries = [self.entry(n * plan.fetch + m) for m in range(plan.fetch)]
            some, all_ = entries[0][1], entries[0][2]
            for _, ok, full in entries[1:]:
                some, all_ = some | ok, all_ & full
            starts = [jnp.where(ok, k, FAR) for k, ok, _ in entries]
            keys, values = self.buffers[0].at[slot], self.buffers[1].at[slot]

            @pl.when(all_)
            def _():
                update(keys, values, None)

            @pl.when(some & jnp.logical_not(all_))
            def _():
                update(keys, values, starts)

            return 0

        jax.lax.fori_loop(0, steps, step, 0)

    def positions(self, starts: Sequence[Any], axis: int) -> Array:
        """Positions of the columns, `[1, columns]` (axis 1) or `[columns, 1]`."""
        size = self.plan.lay.block_k
        shape = (1, self.plan.columns) if axis else (self.plan.columns, 1)
        column = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        shift = jnp.full(shape, starts[0], jnp.int32)
        for n, start in enumerate(starts[1:], 1):
            shift = jnp.where(column >= n * size, start - n * size, shift)
        return column + shift

    def queries(self) -> Array:
        """Positions of the rows, `[rows, 1]`."""
        lay = self.plan.lay
        shape = (lay.rows, lay.block_q, 1)
        row = jax.lax.broadcasted_iota(jnp.int32, shape, 1).reshape(-1, 1)
        return self.first + row

    def seen(self, starts: Sequence[Any]) -> Array:
        """The mask `[rows, columns]`."""
        columns = self.positions(starts, 1)
        return self.plan.rules.visible(self.queries(), columns, self.kv_len)

    def cleared(self, block: Array, starts: Sequence[Any]) -> Array:
        """A block `[columns, D]` with zeros where there is no key: 0 * NaN is NaN."""
        live = self.positions(starts, 0) < self.kv_len
        return jnp.where(live, block.astype(jnp.float32), 0.0).astype(block.dtype)


def by_lane(x: Array, plan: Plan, r: int) -> Array:
    """Head `r` of a column `[rows, 128]` (equal lanes) as a row `[1, block_q]`."""
    size = plan.lay.block_q
    return jnp.transpose(x[r * size : (r + 1) * size])[0:1]


def by_sublane(rows: Array, plan: Plan) -> Array:
    """Rows `[R, block_q]` as a column `[R * block_q, 1]`."""
    columns = [
        jnp.transpose(jnp.broadcast_to(rows[r : r + 1], (LANES, plan.lay.block_q)))
        for r in range(plan.lay.rows)
    ]
    return jnp.concatenate([c[:, :1] for c in columns], axis=0)


def logits_of(scores: Array, rules: Rules) -> tuple[Array, Array | None]:
    """Base-2 logits of the products, and d logit / d product without the scale."""
    if rules.softcap is None:
        return scores * (rules.scale * LOG2E), None
    inner = jnp.tanh(scores * (rules.scale / rules.softcap))
    return inner * (rules.softcap * LOG2E), 1.0 - inner * inner
