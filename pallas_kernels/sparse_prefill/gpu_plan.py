"""What the Hopper kernels are given and share: sizes, lists, products, copies."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from kvjax.pallas_kernels import tuning
from kvjax.pallas_kernels.sparse_prefill.args import SparseArgs
from kvjax.pallas_kernels.sparse_prefill.layout import Layout, Rules, layout
from kvjax.pallas_kernels.sparse_prefill.patterns import (
    BlockList,
    Diagonals,
    table,
)

ROWS = 64  # of one warp group's product
LOG2E = 1.4426950408889634


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the kernel knows when it is traced."""

    lay: Layout
    rules: Rules
    diagonals: bool
    groups: int  # compute warp groups
    stages: int  # KV blocks in shared memory
    lists: int  # heads of the table
    dtype: Any
    interpret: bool

    @property
    def rows(self) -> int:
        """Queries of a thread block."""
        return self.groups * ROWS

    @property
    def tiles(self) -> int:
        """Thread blocks along the queries."""
        return -(-self.lay.tokens // self.rows)

    @property
    def factor(self) -> float:
        """From what the softmax is taken of to logits in base 2."""
        return LOG2E * (self.rules.softcap or self.rules.scale)

    def product(self, a: Any, b: Any) -> Any:
        """`a @ b` in float32, `b` in shared memory, `a` there or in registers."""

        def multiply(acc):
            plgpu.wgmma(acc, a, b)
            return acc[...]

        shape = (a.shape[0], b.shape[1])
        return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))

    def accumulate(self, acc: Any, a: Any, b: Any, staged: Any) -> Any:
        """`acc + a @ b`, `a` in registers, or in `staged` for the interpreter."""
        if self.interpret:  # multiplies from shared memory, and knows no `run_state`
            staged[...] = a
            plgpu.commit_smem()
            return acc + self.product(staged, b)

        def multiply(acc):
            plgpu.wgmma(acc, a, b)

        return pl.run_state(multiply)(plgpu.WGMMAAccumulatorRef.init(acc))

    def logits(self, products: Any) -> tuple[Any, Any]:
        """Logits in base 2, and the slope of the soft cap or None."""
        if self.rules.softcap is None:
            return products * self.factor, None
        bent = jnp.tanh(products * (self.rules.scale / self.rules.softcap))
        return bent * self.factor, 1.0 - bent * bent


def make_plan(args: SparseArgs, tiles, interpret: bool) -> Plan:
    """The plan of a call.

    Raises:
        NotImplementedError: what the kernel does not take, see `gpu`.
    """
    q, pattern, rules = args.q, args.pattern, args.rules
    lay = layout(q, args.k, pattern)
    if q.dtype != jnp.bfloat16 or lay.dim not in (64, 128):
        raise NotImplementedError(
            "sparse_prefill: the GPU kernel takes bfloat16 and D of 64 or 128; got "
            f"{q.dtype} and {lay.dim}."
        )
    if lay.block_q % ROWS or lay.block_k not in (64, 128):
        raise NotImplementedError(
            "sparse_prefill: the GPU kernel needs block_q a multiple of 64 and "
            f"block_k 64 or 128; got {lay.block_q} and {lay.block_k}."
        )
    if rules.scale <= 0:
        raise NotImplementedError(
            f"sparse_prefill: the GPU kernel needs a positive scale; got {rules.scale}."
        )
    return Plan(
        lay=lay,
        rules=rules,
        diagonals=isinstance(pattern, Diagonals),
        groups=2 if lay.block_q % (2 * ROWS) == 0 else 1,
        stages=tuning.tiles("sparse_prefill", "h200", dict(tiles))["stages"],
        lists=table(pattern).shape[1],
        dtype=q.dtype,
        interpret=interpret,
    )


def make_lists(
    plan: Plan, args: SparseArgs
) -> tuple[Int[Array, "B Hx N C"], Int[Array, "B Hx Nq"]]:
    """Entries, and their number per query block.

    One list for all query blocks is sorted, so that those which a query block can see
    are in front: the kernel then stops at the last of them.
    """
    lay, rules, pattern = plan.lay, plan.rules, args.pattern
    if isinstance(pattern, BlockList):
        return pattern.index, jnp.clip(pattern.counts, 0, lay.capacity)
    used = jnp.arange(lay.capacity) < pattern.counts[..., None]
    far = jnp.iinfo(jnp.int32).max
    entries = jnp.sort(jnp.where(used, table(pattern), far), axis=-1)[:, :, None]
    i = jnp.arange(lay.q_blocks, dtype=jnp.int32)[:, None]
    block = entries
    if isinstance(pattern, Diagonals):
        base = (args.q_start // pattern.block)[:, None, None, None] + i
        block = jnp.where(entries == far, -1, base - entries)
    ok = (block >= 0) & (block < lay.kv_blocks)
    first = args.q_start[:, None, None, None] + i * lay.block_q
    length = args.kv_len[:, None, None, None]
    k = block * lay.block_k
    ok = ok & rules.touches(first, lay.block_q, k, lay.block_k, length)
    last = jnp.where(ok, jnp.arange(lay.capacity, dtype=jnp.int32) + 1, 0)
    return entries, jnp.max(last, axis=-1)


def last_block(plan: Plan, x: Array, kv_len: Int[Array, "B"]) -> Array:
    """The block of `x [B, K, S, D]` in which row ends, zeros in its free slots.

    Where keys of weight 0 are multiplied, 0 * NaN would reach the output.
    """
    size = plan.lay.block_k
    position = (kv_len // size * size)[:, None] + jnp.arange(size)
    live = (position < kv_len[:, None])[:, None, :, None]
    at = jnp.minimum(position, plan.lay.slots - 1)[:, None, :, None]
    return jnp.where(live, jnp.take_along_axis(x, at, axis=2), 0)


def operands(plan: Plan, count: int, rows: int, columns: int | None = None) -> Any:
    """Shared memory for `count` operands of products, `D` columns each."""
    tiling = plgpu.TilingTransform((8, 64))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
    shape = (count, rows, columns or plan.lay.dim)
    return plgpu.SMEM(shape, plan.dtype, transforms=(tiling, swizzle))


def copy_blocks(plan: Plan, count, block_of, last, sources, buffers, ready, free):
    """Copy the KV blocks of a list, as the compute warp groups make room for them.

    Args:
        plan: sizes.
        count: entries of the list.
        block_of: KV block of an entry.
        last: the block with free slots.
        sources: of the two: as it is, and its `last_block` or None for as it is.
        buffers: of the two.
        ready: barriers of the two, for what has come.
        free: barriers of the two, for what has been used.
    """

    @pl.loop(0, count)
    def _(e):
        slot = lax.rem(e, jnp.int32(plan.stages))
        j = block_of(e)
        block = pl.ds(j * plan.lay.block_k, plan.lay.block_k)
        for at, (source, ends) in enumerate(sources):
            full, to = free[at].at[slot], (buffers[at].at[slot], ready[at].at[slot])
            pl.when(e >= plan.stages)(functools.partial(plgpu.barrier_wait, full))
            copy_block(source.at[block], ends, j >= last, to)

    for slot in range(plan.stages):  # the interpreter wants every phase waited for
        for barrier in free:
            used = functools.partial(plgpu.barrier_wait, barrier.at[slot])
            pl.when(slot < count)(used)


def copy_block(whole: Any, ends: Any, at_end: Any, to: tuple[Any, Any]) -> None:
    """Copy `ends` where a row ends, else `whole`, `to` a buffer with a barrier."""
    if ends is None:
        plgpu.copy_gmem_to_smem(whole, *to)
        return
    pl.when(at_end)(lambda: plgpu.copy_gmem_to_smem(ends, *to))
    pl.when(jnp.logical_not(at_end))(lambda: plgpu.copy_gmem_to_smem(whole, *to))
