"""Shared pieces of the references that work on held tokens, wherever they lie.

A cache holds its tokens in any order, and each head may hold others: `positions
[K, S]` are absolute, `-1` is a free slot. `q [H, T, D]` stands at `q_positions [T]`
(`-1`: padding); `k`, `v [K, S, D]`; keys and queries after RoPE. Query head `h` reads
KV head `h // (H / K)`. Scores are `[K, S]`: `+inf` is protected, `-inf` a free slot.
Nothing depends on the number of a slot; ties go to the lower position.
"""

import numpy as np


def turn(x: np.ndarray, positions: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """`x [..., D]` turned by RoPE to (or by) `positions [...]`; negative turns back.

    "Rotate half": channel `c` pairs with `c + D/2` and turns by
    `position * frequencies[c]`.
    """
    angles = np.asarray(positions, np.float64)[..., None] * frequencies
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )


def visible(
    q_positions: np.ndarray, positions: np.ndarray, sliding: int | None = None
) -> np.ndarray:
    """Which held tokens each query may read, `[T, S]`; `positions [S]`.

    Causal, no free slots; with `sliding`, a query reads the last `sliding` positions,
    its own included (`q - p < sliding`).
    """
    q, p = np.asarray(q_positions)[:, None], np.asarray(positions)[None]
    seen = (p >= 0) & (p <= q)
    return seen if sliding is None else seen & (q - p < sliding)


def similarity(
    q: np.ndarray,
    k: np.ndarray,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> np.ndarray:
    """Logits `[H, T, S]`, unmasked: `x = scale * q k`, `softcap tanh(x / softcap)`."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    size = q.shape[0] // k.shape[0]
    raw = np.stack([scale * q[h] @ k[h // size].T for h in range(q.shape[0])])
    return raw if softcap is None else softcap * np.tanh(raw / softcap)


def masked_softmax(logits: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Softmax over the last axis among `allowed`; a row with none is all zero."""
    logits = np.where(allowed, logits, -np.inf)
    top = logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total > 0, total, 1.0)


def attention_to_held(
    q: np.ndarray,
    k: np.ndarray,
    *,
    positions: np.ndarray,
    q_positions: np.ndarray,
    scale: float | None = None,
    softcap: float | None = None,
    sliding: int | None = None,
) -> np.ndarray:
    """Attention weights `[H, T, S]` over the held tokens."""
    logits = similarity(q, k, scale=scale, softcap=softcap)
    size = q.shape[0] // k.shape[0]
    weights = np.zeros_like(logits)
    for h in range(q.shape[0]):
        allowed = visible(q_positions, positions[h // size], sliding)
        weights[h] = masked_softmax(logits[h], allowed)
    return weights


def last_queries(
    q: np.ndarray, q_positions: np.ndarray, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """The `window` latest queries and their positions in order; fewer if there are."""
    order = np.argsort(q_positions, kind="stable")
    order = order[np.asarray(q_positions)[order] >= 0][-window:]
    return q[:, order], np.asarray(q_positions)[order]


def pool(
    x: np.ndarray, positions: np.ndarray, *, kernel: int, how: str, by: str = "rank"
) -> np.ndarray:
    """`x [S]` pooled over `kernel` (odd) neighbours in order of position.

    Only slots with `positions [S] >= 0` are pooled and count; others are left alone.
    `how="mean"` divides by `kernel` at the ends too (zero padding that counts),
    `how="max"` takes the neighbours there are. `by="rank"`: the neighbours are the next
    held tokens, gaps or not (what a compacted cache does); `by="distance"`: those
    within `kernel // 2` positions. The same where no position is missing.
    """
    assert kernel % 2 == 1 and how in ("mean", "max") and by in ("rank", "distance")
    held = np.flatnonzero(np.asarray(positions) >= 0)
    order = held[np.argsort(np.asarray(positions)[held], kind="stable")]
    place = np.arange(len(order)) if by == "rank" else np.asarray(positions)[order]
    pooled = np.array(x, np.float64)
    for here, slot in zip(place, order, strict=True):
        near = x[order[np.abs(place - here) <= kernel // 2]]
        pooled[slot] = near.sum() / kernel if how == "mean" else near.max()
    return pooled


def best(scores: np.ndarray, positions: np.ndarray, n: int) -> np.ndarray:
    """Slots of the `n` best held tokens of `scores [S]`; ties: lower position."""
    order = np.lexsort((positions, -scores))
    return order[np.asarray(positions)[order] >= 0][:n]


def kept_positions(mask: np.ndarray, positions: np.ndarray) -> list[np.ndarray]:
    """Sorted positions that `mask [K, S]` keeps, per KV head."""
    return [np.sort(p[m]) for m, p in zip(mask, positions, strict=True)]
