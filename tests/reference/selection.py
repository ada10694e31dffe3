"""Reference choices that are not "the top n of each head": budgets and chunks."""

import numpy as np

from .base import kept, top


def pyramidkv_layer_budgets(
    length: int, keep: float, n_layers: int, *, window: int = 64, beta: int = 20
) -> list[int]:
    """Tokens kept per head in each layer, the window included.

    Source: METHODS A 1.1, kvpress `pyramidkv_press.py`; `keep` is one minus its
    compression ratio, `round` is Python's (halves to even).
    """
    cap = window + length * keep
    low = (cap - window) / beta
    high = 2 * (cap - window) - low
    if high >= length - window:
        high = length - window
        low = 2 * (cap - window) - high
    if not length >= high >= low >= window:
        return [round(length * keep)] * n_layers
    step = (high - low) / (n_layers - 1) if n_layers > 1 else 0.0
    return [round(high - layer * step) for layer in range(n_layers)]


def adakv_kept(scores: np.ndarray, n: int, *, alpha: float = 0.2) -> list[np.ndarray]:
    """Sorted kept positions per KV head; `K * n` in total, shared by the heads.

    Source: METHODS A 1.1, kvpress `adakv_press.py`: the best `int(alpha * n)` of each
    head are safe, then the `K * (S - n)` lowest of all heads together go.
    """
    kv_heads, length = scores.shape
    safe = scores.copy()
    for head in range(kv_heads):
        safe[head, top(scores[head], int(alpha * n))] = np.inf
    chosen = np.zeros(kv_heads * length, bool)
    chosen[top(safe.ravel(), kv_heads * n)] = True
    return [np.flatnonzero(row) for row in chosen.reshape(kv_heads, length)]


def duo_kept(
    gates: np.ndarray, length: int, *, sparsity: float, sink: int, recent: int
) -> list[list[np.ndarray]]:
    """Sorted kept positions by layer and KV head.

    Source: METHODS B, DuoAttention (2410.10819): of the gates `[L, K]` the share
    `sparsity` with the lowest are streaming heads, which keep the first `sink` and
    the last `recent` tokens; the others keep all. Gates are taken to be distinct.
    """
    edge = np.quantile(gates, sparsity)
    everything = np.arange(length)
    ends = everything[(everything < sink) | (everything >= length - recent)]
    return [[everything if x >= edge else ends for x in row] for row in gates]


def chunks(length: int, size: int) -> list[np.ndarray]:
    """Positions of each contiguous chunk; the last may be shorter."""
    return [
        np.arange(start, min(start + size, length)) for start in range(0, length, size)
    ]


def chunkkv_kept(
    scores: np.ndarray, keep: float, *, chunk: int = 20, protected: int = 0
) -> list[np.ndarray]:
    """Sorted kept positions, the same for every KV head, in whole chunks.

    Source: METHODS A 1.1, kvpress `chunkkv_press.py`: scores summed over the KV heads,
    mean in the chunk (the remainder is a chunk), the top
    `max(1, int(n_chunks * keep))` chunks. A prompt shorter than one chunk
    falls back to single tokens (not in METHODS; seen in kvpress 0.5.5). Of chunks
    with a score of +inf the newest come first, and where they do not all fit, the
    others' tokens at +inf stay alone: at least `protected` fit.
    """
    kv_heads, length = scores.shape
    if length < chunk:
        return kept(scores, max(1, int(length * keep)))
    summed = scores.sum(axis=0)
    parts = chunks(length, chunk)
    means = [float(summed[part].mean()) for part in parts]
    most = max(1, int(len(parts) * keep))
    slots = max(most * chunk, protected)
    sure = np.flatnonzero(np.isposinf(summed))[-slots:]

    def place(i: int) -> tuple[float, int]:
        return -means[i], -i if np.isposinf(means[i]) else i

    best = sorted(range(len(parts)), key=place)[:most]
    rest = np.concatenate([parts[i] for i in best])
    positions = np.concatenate([sure, rest[~np.isin(rest, sure)]])[:slots]
    return [np.sort(positions)] * kv_heads


def chunkkv_paper_kept(
    scores: np.ndarray, n: int, *, chunk: int = 10, window: int = 32
) -> list[np.ndarray]:
    """Sorted kept positions per KV head: best chunks, then the recent window.

    Source: METHODS B 1.1 (ChunkKV, 2502.00299): chunk score = sum of the token scores
    of the head, the top `n // chunk` chunks in their order, then the tail of
    that list is overwritten by the last `window` tokens. `scores` are plain (no
    +inf). A window token that a chunk brought in already is kept once, so fewer
    than `n` may remain; the text does not say what should fill the gap.
    """
    length = scores.shape[1]
    parts = chunks(length, chunk)
    result = []
    for row in scores:
        sums = np.array([row[part].sum() for part in parts])
        best = np.sort(top(sums, n // chunk))
        positions = np.concatenate([parts[i] for i in best])[:n]
        head_part = positions[: max(0, len(positions) - window)]
        recent = np.arange(length - min(window, len(positions)), length)
        result.append(np.union1d(head_part, recent))
    return result
