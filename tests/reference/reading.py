"""Reference reads: attention over what is left, page and pattern selection."""

import numpy as np

from .base import attention, group_size, kept_mask, resolve_positions, softmax, top


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, allowed) -> np.ndarray:
    """Attention output `[H, T, D]` over the tokens allowed by `[H, T, S]`.

    A row that allows nothing gives zeros.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    size = group_size(q, k)
    out = np.zeros(q.shape)
    for h in range(q.shape[0]):
        logits = q[h] @ k[h // size].T / np.sqrt(q.shape[-1])
        for t in range(q.shape[1]):
            seen = np.flatnonzero(allowed[h, t])
            if len(seen):
                out[h, t] = softmax(logits[t, seen]) @ v[h // size, seen]
    return out


def streaming_mask(length: int, *, sink: int, recent: int) -> np.ndarray:
    """What each token of a prompt sees in a streaming head, `[T, S]`.

    Source: METHODS B, DuoAttention (2410.10819) section 2.2: the first `sink` tokens
    and the last `recent`, itself among them.
    """
    mask = np.zeros((length, length), bool)
    for at in range(length):
        mask[at, : min(sink, at + 1)] = True
        mask[at, max(0, at - recent + 1) : at + 1] = True
    return mask


def attend_kept(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    kept_positions: list[np.ndarray],
    *,
    q_positions: np.ndarray | None = None,
) -> np.ndarray:
    """Attention output `[H, T, D]` of later queries over the kept tokens.

    `q_positions` defaults to "after all keys": every kept token is visible.
    """
    length, size = k.shape[1], group_size(q, k)
    mask = np.repeat(kept_mask(kept_positions, length), size, axis=0)
    if q_positions is None:
        q_positions = np.full(q.shape[1], length)
    causal = np.arange(length)[None, :] <= q_positions[:, None]
    return attend(q, k, v, mask[:, None, :] & causal[None])


def attend_decoupled(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    key_kept: list[np.ndarray],
    value_kept: list[np.ndarray],
) -> np.ndarray:
    """Attention output `[H, T, D]` where keys and values are evicted separately.

    A token with its key but without its value counts in the softmax and brings the
    mean of the dropped values of its head; a value needs its key. "Dropped" are the
    tokens with a key and without a value. Source: the project's definition.
    """
    v = np.asarray(v, np.float64).copy()
    for head, (keys, values) in enumerate(zip(key_kept, value_kept, strict=True)):
        assert np.isin(values, keys).all()
        dropped = np.setdiff1d(keys, values)
        if len(dropped):
            v[head, dropped] = v[head, dropped].mean(axis=0)
    return attend_kept(q, k, v, key_kept)


def quest_bounds(q: np.ndarray, k: np.ndarray, *, page: int = 16) -> np.ndarray:
    """Upper bound `[H, P]` of `q . k` over the keys of each page, for `q [H, D]`.

    Source: METHODS C 1.4 (Quest): per channel the larger of `q * max` and `q * min`,
    summed. Not scaled; the last page may be partly filled.
    """
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    size, length = group_size(q, k), k.shape[1]
    starts = range(0, length, page)
    bounds = np.zeros((q.shape[0], len(starts)))
    for h in range(q.shape[0]):
        for p, start in enumerate(starts):
            keys = k[h // size, start : start + page]
            bounds[h, p] = np.maximum(q[h] * keys.max(0), q[h] * keys.min(0)).sum()
    return bounds


def quest_pages(bounds: np.ndarray, n_pages: int) -> list[np.ndarray]:
    """Sorted pages each row of `bounds [N, P]` reads; the last page always.

    Source: METHODS C 1.4; the original selects per query head. The last page counts
    among the `n_pages`.
    """
    forced = bounds.copy()
    forced[:, -1] = np.inf
    return [np.sort(top(row, n_pages)) for row in forced]


def page_mask(pages: list[np.ndarray], length: int, *, page: int = 16) -> np.ndarray:
    """Tokens of the selected pages, `[N, S]`."""
    page_of = np.arange(length) // page
    return np.stack([np.isin(page_of, chosen) for chosen in pages])


def vertical_slash_mask(
    q: np.ndarray,
    k: np.ndarray,
    *,
    vertical: int,
    slash: int,
    last_q: int = 64,
    forced_verticals: int = 30,
    forced_slashes: int = 100,
    positions=None,
) -> np.ndarray:
    """Causal mask `[H, S, S]` of the best columns and diagonals of each query head.

    Source: METHODS C 1.1 (MInference): softmax of the last `last_q` queries; column
    sums, the first 30 forced; sums along diagonals `o = row - column`, offsets
    0..99 forced; the top `vertical` (at least 30) and `slash` (at least 50). The
    token mask: the original's kernel widens each diagonal to its 64-wide block.
    """
    heads, length, _ = q.shape
    positions = resolve_positions(positions, length)
    last_q = min(last_q, length)
    weights = attention(q[:, length - last_q :], k, k_positions=positions)
    row, column = np.indices((length, length))
    masks = np.zeros((heads, length, length), bool)
    for h in range(heads):
        columns = weights[h].sum(axis=0)
        columns[:forced_verticals] = np.inf
        offsets = np.zeros(length)
        for i in range(last_q):
            at = length - last_q + i
            for j in range(at + 1):
                offsets[at - j] += weights[h, i, j]
        offsets[:forced_slashes] = np.inf
        chosen_columns = top(columns, max(vertical, 30))
        chosen_offsets = top(offsets, max(slash, 50))
        pattern = np.isin(column, chosen_columns) | np.isin(
            row - column, chosen_offsets
        )
        masks[h] = pattern & (column <= row)
    return masks
