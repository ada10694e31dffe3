"""Which query blocks read a KV block: the pattern, seen from the keys.

Diagonals transpose by arithmetic, a shared list is a set of KV blocks; per-block lists
are inverted by one sort into compressed columns.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kvjax.pallas_kernels.sparse_prefill.layout import Layout
from kvjax.pallas_kernels.sparse_prefill.patterns import BlockList, Shared

LANES = 128


def window_rows(lay: Layout) -> int:
    """Rows of 128 entries that hold any one KV block's query blocks."""
    return -(-lay.q_blocks // LANES) + 1


def columns(
    pattern: BlockList, lay: Layout
) -> tuple[Int[Array, "N 1 S"], Int[Array, "N M 1 L"]]:
    """Compressed columns of a list.

    Returns:
        `starts [B * Hx, 1, kv_blocks + 1]` and the query blocks in the order of their
        KV blocks, `[B * Hx, M, 1, 128]` with entry `e` at `(e // 128, 0, e % 128)`;
        those of KV block `j` are the entries from `starts[j]` to `starts[j + 1]`.

    Raises:
        NotImplementedError: more pairs of blocks than an int32 counts.
    """
    most = jnp.iinfo(jnp.int32).max
    if lay.q_blocks * (lay.kv_blocks + 1) > most:
        raise NotImplementedError(
            f"sparse_prefill: {lay.q_blocks} x {lay.kv_blocks} pairs of blocks are "
            "too many for the gradient; use larger blocks."
        )
    index, counts = pattern.index, pattern.counts
    used = jnp.arange(lay.capacity, dtype=jnp.int32) < counts[..., None]
    used = used & (index >= 0) & (index < lay.kv_blocks)
    q_block = jnp.arange(lay.q_blocks, dtype=jnp.int32)[:, None]
    key = jnp.where(used, index * lay.q_blocks + q_block, most)
    key = jnp.sort(key.reshape(-1, lay.q_blocks * lay.capacity), axis=-1)
    bounds = jnp.arange(lay.kv_blocks + 1, dtype=jnp.int32) * lay.q_blocks
    # Unrolled: a loop would hide the bytes of the whole program from cost analysis.
    search = functools.partial(jnp.searchsorted, method="scan_unrolled")
    starts = jax.vmap(search, in_axes=(0, None))(key, bounds)
    entries = key.shape[-1]
    rows = -(-entries // LANES) + window_rows(lay)
    flat = jnp.pad(key % lay.q_blocks, [(0, 0), (0, rows * LANES - entries)])
    return starts.astype(jnp.int32)[:, None], flat.reshape(-1, rows, 1, LANES)


def members(pattern: Shared, lay: Layout) -> Int[Array, "N 1 S"]:
    """1 for the KV blocks that a shared list holds, `[B * Hx, 1, kv_blocks]`."""
    index = pattern.index.reshape(-1, lay.capacity)
    used = jnp.arange(lay.capacity) < pattern.counts.reshape(-1, 1)
    index = jnp.where(used & (index >= 0), index, lay.kv_blocks)
    hit = jnp.zeros((index.shape[0], lay.kv_blocks), jnp.int32)
    hit = hit.at[jnp.arange(index.shape[0])[:, None], index].max(1, mode="drop")
    return hit[:, None]
