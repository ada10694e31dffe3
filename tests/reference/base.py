"""Shared pieces of the references: softmax, RoPE, dense attention, kept sets.

Everything here and in the sibling modules works on one sequence, in float64, with
`q [H, S, D]`, `k [K, S, D]`, `v [K, S, D]`; query head `h` reads KV head
`h // (H / K)`.
"""

import numpy as np


def group_size(q: np.ndarray, k: np.ndarray) -> int:
    """Query heads per KV head."""
    assert q.shape[0] % k.shape[0] == 0
    return q.shape[0] // k.shape[0]


def group_mean(per_query_head: np.ndarray, kv_heads: int) -> np.ndarray:
    """`[H, ...]` averaged over the query heads of each KV head, `[K, ...]`."""
    heads = per_query_head.shape[0]
    size = heads // kv_heads
    return np.stack(
        [per_query_head[n * size : (n + 1) * size].mean(0) for n in range(kv_heads)]
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis; `-inf` entries get exactly zero."""
    top = logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits - top)
    return weights / weights.sum(axis=-1, keepdims=True)


def resolve_positions(positions: np.ndarray | None, length: int) -> np.ndarray:
    """`positions`, or `0 .. length-1` where None."""
    return np.arange(length) if positions is None else np.asarray(positions)


def attention(
    q: np.ndarray,
    k: np.ndarray,
    *,
    q_positions: np.ndarray | None = None,
    k_positions: np.ndarray | None = None,
) -> np.ndarray:
    """Causal attention weights `[H, T, S]`, scale `1/sqrt(D)`.

    The queries default to the last `T` of the `S` positions.
    """
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    heads, n_queries, width = q.shape
    length = k.shape[1]
    k_positions = resolve_positions(k_positions, length)
    if q_positions is None:
        q_positions = k_positions[length - n_queries :]
    size = group_size(q, k)
    hidden = k_positions[None, :] > q_positions[:, None]
    weights = np.zeros((heads, n_queries, length))
    for h in range(heads):
        logits = q[h] @ k[h // size].T / np.sqrt(width)
        weights[h] = softmax(np.where(hidden, -np.inf, logits))
    return weights


def protect(scores: np.ndarray, where: slice) -> np.ndarray:
    """A copy of `scores [K, S]` with `+inf` at the tokens in `where`."""
    scores = scores.copy()
    scores[:, where] = np.inf
    return scores


def top(scores: np.ndarray, n: int) -> np.ndarray:
    """Indices of the `n` highest of `scores [S]`; ties go to the lower index."""
    return np.argsort(-scores, kind="stable")[:n]


def kept(scores: np.ndarray, n: int) -> list[np.ndarray]:
    """Sorted positions of the `n` highest-scored tokens of each KV head."""
    return [np.sort(top(row, n)) for row in scores]


def kept_mask(kept_positions: list[np.ndarray], length: int) -> np.ndarray:
    """Kept positions per KV head as a mask `[K, S]`."""
    mask = np.zeros((len(kept_positions), length), bool)
    for head, positions in enumerate(kept_positions):
        mask[head, positions] = True
    return mask


def rotation(angles: np.ndarray) -> np.ndarray:
    """RoPE matrix `[D, D]` of one position, "rotate half" pairing.

    Channel `c` pairs with `c + D/2`; `angles [D/2]` is `position * inv_freq`.
    """
    cos, sin = np.diag(np.cos(angles)), np.diag(np.sin(angles))
    return np.block([[cos, -sin], [sin, cos]])


def rotate(
    x: np.ndarray, positions: np.ndarray, inv_freq: np.ndarray, *, inverse: bool = False
) -> np.ndarray:
    """`x [N, S, D]` turned to its positions by RoPE (or back)."""
    x = np.asarray(x, np.float64)
    sign = -1.0 if inverse else 1.0
    turned = np.empty_like(x)
    for s, position in enumerate(positions):
        turned[:, s] = x[:, s] @ rotation(sign * position * inv_freq).T
    return turned


def value_output_norm(v: np.ndarray, w_o: np.ndarray) -> np.ndarray:
    """`||W_O^(h) v_j||_1` averaged over the query heads of each KV head, `[K, S]`."""
    v, w_o = np.asarray(v, np.float64), np.asarray(w_o, np.float64)
    size = group_size(w_o, v)
    norms = [np.abs(v[h // size] @ w_o[h]).sum(-1) for h in range(w_o.shape[0])]
    return group_mean(np.stack(norms), v.shape[0])
