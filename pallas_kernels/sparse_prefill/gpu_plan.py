"""What the Hopper kernel is given: sizes, lists, the last block of values."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from kvjax.pallas_kernels import tuning
from kvjax.pallas_kernels.sparse_prefill.layout import Layout, Rules, layout
from kvjax.pallas_kernels.sparse_prefill.patterns import (
    BlockList,
    Diagonals,
    Pattern,
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


def make_plan(q, k, pattern: Pattern, rules: Rules, tiles, interpret: bool) -> Plan:
    """The plan of a call.

    Raises:
        NotImplementedError: what the kernel does not take, see `gpu`.
    """
    lay = layout(q, k, pattern)
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
        stages=tuning.tiles("sparse_prefill", "h200", tiles)["stages"],
        lists=table(pattern).shape[1],
        dtype=q.dtype,
        interpret=interpret,
    )


def make_lists(
    plan: Plan, pattern: Pattern, q_start: Int[Array, "B"], kv_len: Int[Array, "B"]
) -> tuple[Int[Array, "B Hx N C"], Int[Array, "B Hx Nq"]]:
    """Entries, and their number per query block.

    One list for all query blocks is sorted, so that those which a query block can see
    are in front: the kernel then stops at the last of them.
    """
    lay, rules = plan.lay, plan.rules
    if isinstance(pattern, BlockList):
        return pattern.index, jnp.clip(pattern.counts, 0, lay.capacity)
    used = jnp.arange(lay.capacity) < pattern.counts[..., None]
    far = jnp.iinfo(jnp.int32).max
    entries = jnp.sort(jnp.where(used, table(pattern), far), axis=-1)[:, :, None]
    i = jnp.arange(lay.q_blocks, dtype=jnp.int32)[:, None]
    block = entries
    if isinstance(pattern, Diagonals):
        base = (q_start // pattern.block)[:, None, None, None] + i
        block = jnp.where(entries == far, -1, base - entries)
    ok = (block >= 0) & (block < lay.kv_blocks)
    first = q_start[:, None, None, None] + i * lay.block_q
    length = kv_len[:, None, None, None]
    k = block * lay.block_k
    ok = ok & rules.touches(first, lay.block_q, k, lay.block_k, length)
    last = jnp.where(ok, jnp.arange(lay.capacity, dtype=jnp.int32) + 1, 0)
    return entries, jnp.max(last, axis=-1)


def last_values(plan: Plan, v: Array, kv_len: Int[Array, "B"]) -> Array:
    """The block of values in which row ends: 0 * NaN would reach the output."""
    size = plan.lay.block_k
    position = (kv_len // size * size)[:, None] + jnp.arange(size)
    live = (position < kv_len[:, None])[:, None, :, None]
    at = jnp.minimum(position, plan.lay.slots - 1)[:, None, :, None]
    return jnp.where(live, jnp.take_along_axis(v, at, axis=2), 0)
