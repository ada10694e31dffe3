"""Which KV blocks each query block reads: three forms of one table.

Entries past `counts` are ignored and may hold anything; a listed block that lies
outside the keys, or that no query of its block may see, counts as nothing.
A block must not be listed twice for one query block: its keys would weigh double.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kvjax.types import pytree, static


@pytree
class BlockList:
    """A list of KV blocks per (head, query block).

    Attributes:
        index: KV blocks, `[B, Hx, ceil(T / block_q), C]` int32.
        counts: entries used of each list, `[B, Hx, ceil(T / block_q)]` int32.
        block_q: queries per block; block 0 starts with the call's first query.
        block_k: keys per block; block 0 starts at position 0.
    """

    index: Int[Array, "B Hx N C"]
    counts: Int[Array, "B Hx N"]
    block_q: int = static()
    block_k: int = static()


@pytree
class Diagonals:
    """Diagonals of square blocks: KV block = query block - offset.

    Query block `i` of the call is block `q_start // block + i` of the sequence, so
    chunks should start at multiples of `block`.

    Attributes:
        offsets: `[B, Hx, C]` int32.
        counts: offsets used, `[B, Hx]` int32.
        block: queries and keys per block.
    """

    offsets: Int[Array, "B Hx C"]
    counts: Int[Array, "B Hx"]
    block: int = static()

    @property
    def block_q(self) -> int:
        """Queries per block."""
        return self.block

    @property
    def block_k(self) -> int:
        """Keys per block."""
        return self.block


@pytree
class Shared:
    """The same KV blocks for every query block of a head.

    Attributes:
        index: KV blocks, `[B, Hx, C]` int32.
        counts: entries used, `[B, Hx]` int32.
        block_q: queries per block, a tile size only.
        block_k: keys per block; block 0 starts at position 0.
    """

    index: Int[Array, "B Hx C"]
    counts: Int[Array, "B Hx"]
    block_q: int = static()
    block_k: int = static()


Pattern = BlockList | Diagonals | Shared


def table(pattern: Pattern) -> Int[Array, "B Hx *N C"]:
    """The array of entries, whatever its name."""
    return pattern.offsets if isinstance(pattern, Diagonals) else pattern.index


def kv_blocks(
    pattern: Pattern, q_block: Any, q_start: Int[Array, "B"]
) -> tuple[Int[Array, "B Hx C"], Bool[Array, "B Hx C"]]:
    """KV blocks of one query block of the call, and which entries are used."""
    entries, counts = table(pattern), pattern.counts
    if isinstance(pattern, BlockList):
        entries, counts = entries[:, :, q_block], counts[:, :, q_block]
    elif isinstance(pattern, Diagonals):
        base = q_start // pattern.block + q_block
        entries = base[:, None, None] - entries
    used = jnp.arange(entries.shape[-1], dtype=jnp.int32) < counts[..., None]
    return entries, used
