"""The least time that an op can take, from what it has to move and to compute."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from kvjax.pallas_kernels.sparse_prefill.patterns import BlockList, Diagonals


def floor_s(
    op: str, load: Any, filled: Callable[[], Any], copy: float, rate: float
) -> tuple[float, str]:
    """Seconds, and whether memory or products are the bound.

    Args:
        op: its name.
        load: its workload; where products count, each array moves once.
        filled: gives `(args, kwargs)` of the op, with what its lists name.
        copy: bytes per second that the card copies.
        rate: operations per second of its matrix units.
    """
    if op not in OPERATIONS:
        return load.floor_bytes / copy, "memory"
    args, kwargs = filled()
    arrays = [x for x in jax.tree.leaves((args, kwargs)) if hasattr(x, "nbytes")]
    move = sum(x.nbytes for x in arrays) / copy
    compute = OPERATIONS[op](*args, **kwargs) / rate
    return max((move, "memory"), (compute, "products"))


def _sparse_prefill(q: Any, k: Any, v: Any, pattern: Any, **_: Any) -> float:
    """Two products for each pair of blocks that the causal rule lets be seen."""
    _, heads, tokens, dim = q.shape
    if isinstance(pattern, Diagonals):
        block_q = block_k = pattern.block
        index, rows = np.asarray(pattern.offsets), tokens // block_q
        pairs = np.sum(np.maximum(0, rows - index))
        lists = index.shape[1]
    else:
        block_q, block_k = pattern.block_q, pattern.block_k
        index, rows = np.asarray(pattern.index), tokens // block_q
        shift = k.shape[2] - tokens
        last = (1 + np.arange(rows)) * block_q - 1 + shift
        each = index if isinstance(pattern, BlockList) else index[:, :, None]
        pairs = np.sum(each * block_k <= last[:, None])
        lists = index.shape[1]
    return 4.0 * dim * block_q * block_k * float(pairs) * (heads // lists)


def _column_stats(q: Any, k: Any, *_: Any, **__: Any) -> float:
    """One product of the last queries with the keys that they see."""
    batch, heads, tokens, dim = q.shape
    seen = tokens * k.shape[2] - tokens * (tokens - 1) // 2
    return 2.0 * dim * batch * heads * seen


def _block_score(
    q: Any, k: Any, *, mode: str = "antidiagonal", stride: int = 16, **how: Any
) -> float:
    """Products of groups of tokens, half of which lie in the past."""
    batch, heads, tokens, dim = q.shape
    pairs = tokens * k.shape[2] / 2
    if mode == "mean":
        return 2.0 * dim * batch * heads * pairs / (how["block_q"] * how["block_k"])
    return 2.0 * dim * batch * heads * pairs / stride


OPERATIONS: Mapping[str, Any] = {
    "sparse_prefill": _sparse_prefill,
    "column_stats": _column_stats,
    "block_score": _block_score,
}
