"""Shapes and visibility rules that all implementations share."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.pallas_kernels.sparse_prefill.patterns import BlockList, Pattern, table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """The static settings of a call; hashable."""

    scale: float
    window: int | None = None
    sinks: int = 0
    softcap: float | None = None
    causal: bool = True

    def visible(self, q: Any, k: Any, kv_len: Any) -> Any:
        """Whether queries at positions `q` see keys at `k`; broadcasts."""
        seen = k < kv_len
        if self.causal:
            seen = seen & (k <= q)
        if self.window is not None:
            seen = seen & ((q - k < self.window) | (k < self.sinks))
        return seen

    def touches(self, q: Any, block_q: int, k: Any, block_k: int, kv_len: Any) -> Any:
        """Whether any query from position `q` on sees any key of the block at `k`."""
        seen = (k >= 0) & (k < kv_len)
        if self.causal:
            seen = seen & (k < q + block_q)
        if self.window is not None:
            near = q - (k + block_k - 1) < self.window
            seen = seen & (near | (k < self.sinks))
        return seen

    def covers(self, q: Any, block_q: int, k: Any, block_k: int, kv_len: Any) -> Any:
        """Whether every query from position `q` on sees all keys of the block at `k`.

        May be False where it could be True, never the reverse.
        """
        seen = (k >= 0) & (k + block_k <= kv_len)
        if self.causal:
            seen = seen & (k + block_k - 1 <= q)
        if self.window is not None:
            near = q + block_q - 1 - k < self.window
            seen = seen & (near | (k + block_k <= self.sinks))
        return seen


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How queries and keys are cut into blocks and query heads into rows.

    Query heads of one KV head that share a list are rows of one tile, so that their
    keys are read once: `lists = K`, `rows = G`. Lists per query head: `lists = H`,
    `rows = 1`.

    Attributes:
        lists: heads of the grid, each with one list per query block.
        rows: query heads per list.
        group: lists per KV head.
        own: whether each list head has its own table, or all share one (`Hx = 1`).
        q_blocks: query blocks.
        kv_blocks: KV blocks.
        capacity: entries of a list, `C`.
    """

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    slots: int
    dim: int
    lists: int
    rows: int
    group: int
    own: bool
    block_q: int
    block_k: int
    q_blocks: int
    kv_blocks: int
    capacity: int
    per_block: bool  # the table has an axis of query blocks

    @property
    def entries(self) -> int:
        """KV blocks that all lists together name, full ones."""
        return self.batch * self.lists * self.q_blocks * self.capacity

    def split_queries(self, x: Float[Array, "B H T D"]) -> Array:
        """`[B, H, T, D]` to `[B, lists, rows, q_blocks * block_q, D]`, zeros behind."""
        pad = self.q_blocks * self.block_q - self.tokens
        x = jnp.pad(x, [(0, 0), (0, 0), (0, pad), (0, 0)]) if pad else x
        return x.reshape(self.batch, self.lists, self.rows, -1, self.dim)

    def join_queries(self, x: Array) -> Array:
        """The reverse of `split_queries`, for any last axis."""
        x = x.reshape(self.batch, self.heads, -1, x.shape[-1])
        return x[:, :, : self.tokens]

    def pad_keys(self, x: Float[Array, "B K S D"]) -> Array:
        """Zeros behind the last key, up to whole blocks."""
        pad = self.kv_blocks * self.block_k - self.slots
        return jnp.pad(x, [(0, 0), (0, 0), (0, pad), (0, 0)]) if pad else x


def layout(q: Array, k: Array, pattern: Pattern) -> Layout:
    """The layout of a call."""
    (batch, heads, tokens, dim), (kv_heads, slots) = q.shape, k.shape[1:3]
    lists_of = table(pattern).shape[1]
    lists = heads if lists_of == heads else kv_heads
    return Layout(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        tokens=tokens,
        slots=slots,
        dim=dim,
        lists=lists,
        rows=heads // lists,
        group=lists // kv_heads,
        own=lists_of == lists,
        block_q=pattern.block_q,
        block_k=pattern.block_k,
        q_blocks=-(-tokens // pattern.block_q),
        kv_blocks=-(-slots // pattern.block_k),
        capacity=table(pattern).shape[-1],
        per_block=isinstance(pattern, BlockList),
    )
