"""Reference token scores `[K, S]`: higher is kept longer, protected tokens are +inf.

"METHODS" below is the project's digest of the published methods; the source
named with each function is the one that digest gives. Arguments as in `base`.
"""

import numpy as np

from .base import (
    attention,
    group_mean,
    protect,
    resolve_positions,
    rotate,
    rotation,
    softmax,
    top,
    value_output_norm,
)


def score_streaming_llm(q, k, v, *, n_sink: int = 4, positions=None) -> np.ndarray:
    """Sinks first, then the newest.

    Source: METHODS A 1.1, kvpress `streaming_llm_press.py`: keep the first `n_sink`
    and the newest. There a 0/1 score that knows the budget; here the position.
    """
    del q, v
    kv_heads, length, _ = k.shape
    order = resolve_positions(positions, length).astype(float)
    return protect(np.tile(order, (kv_heads, 1)), slice(0, n_sink))


def score_knorm(q, k, v) -> np.ndarray:
    """Minus the L2 norm of the post-RoPE key.

    Source: METHODS A 1.1, kvpress `knorm_press.py`; nothing is protected.
    """
    del q, v
    return -np.sqrt((np.asarray(k, np.float64) ** 2).sum(-1))


def score_keydiff(q, k, v) -> np.ndarray:
    """Minus the cosine between a key and the mean of the normalised keys.

    Source: METHODS A 1.1, kvpress `keydiff_press.py`.
    """
    del q, v
    scores = []
    for keys in np.asarray(k, np.float64):
        unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
        anchor = unit.mean(0)
        scores.append(-(unit @ anchor) / np.linalg.norm(anchor))
    return np.stack(scores)


def average_pool(x: np.ndarray, kernel: int) -> np.ndarray:
    """Mean over `kernel` neighbours of `x [S]`; the zero padding counts."""
    half = kernel // 2
    pooled = np.zeros_like(x)
    for j in range(len(x)):
        window = x[max(0, j - half) : j + half + 1]
        pooled[j] = window.sum() / kernel
    return pooled


def score_snapkv(
    q, k, v, *, window: int = 64, kernel: int = 5, positions=None
) -> np.ndarray:
    """Mean attention of the last `window` queries, pooled along the tokens.

    Source: METHODS A 1.1, kvpress `snapkv_press.py`: softmax over all keys (causal),
    window columns dropped, mean over the window's queries, average pool with
    counted zero padding, mean over the group; the window is protected.
    """
    del v
    length = k.shape[1]
    assert length > window
    positions = resolve_positions(positions, length)
    weights = attention(q[:, length - window :], k, k_positions=positions)
    received = weights[:, :, : length - window].mean(axis=1)
    pooled = np.stack([average_pool(row, kernel) for row in received])
    scores = np.full((k.shape[0], length), np.inf)
    scores[:, : length - window] = group_mean(pooled, k.shape[0])
    return scores


def score_tova(q, k, v, *, positions=None) -> np.ndarray:
    """Attention of the last query, averaged over all query heads.

    Source: METHODS A 1.1, kvpress `tova_press.py`: the same row for every KV head,
    last token protected.
    """
    del v
    length = k.shape[1]
    positions = resolve_positions(positions, length)
    weights = attention(q[:, length - 1 :], k, k_positions=positions)
    shared = weights[:, 0].mean(axis=0)
    return protect(np.tile(shared, (k.shape[0], 1)), slice(length - 1, length))


def score_observed_attention(q, k, v, *, positions=None) -> np.ndarray:
    """Attention received, divided by the number of queries that see the token.

    Source: METHODS A 1.1, kvpress `observed_attention_press.py` ("H2O" there): column
    sum over all queries, divided by `S - j`, mean over the group; no protection.
    """
    del v
    length = k.shape[1]
    weights = attention(q, k, k_positions=resolve_positions(positions, length))
    seen_by = length - np.arange(length)
    return group_mean(weights.sum(axis=1) / seen_by, k.shape[0])


def score_h2o(q, k, v, *, recent: int = 0, positions=None) -> np.ndarray:
    """Attention received, accumulated over all queries.

    Source: METHODS A 1.4, H2O `h2o_hf` (raw column sums; its `recent` newest tokens
    are kept besides the heavy hitters). Sum over the group: the original has
    one query head per KV head.
    """
    del v
    length, kv_heads = k.shape[1], k.shape[0]
    weights = attention(q, k, k_positions=resolve_positions(positions, length))
    received = weights.sum(axis=1)
    scores = group_mean(received, kv_heads) * (q.shape[0] // kv_heads)
    return protect(scores, slice(length - recent, length))


def score_expected_attention(
    q,
    k,
    v,
    *,
    inv_freq,
    n_future: int = 512,
    n_sink: int = 4,
    use_covariance: bool = True,
    use_vnorm: bool = True,
    epsilon: float = 0.0,
    positions=None,
) -> np.ndarray:
    """Attention expected from Gaussian queries at the coming positions.

    Source: METHODS A 1.1, kvpress `expected_attention_press.py`: mean and covariance
    (divided by N) of the pre-RoPE queries after the sinks, turned by the mean RoPE
    matrix `R` of the next `n_future` positions; `logit = mu k / sqrt(d) +
    k' Sigma k / (2 d)`; softmax over the tokens after the sinks; mean over the
    group; `(p + epsilon) * ||v||_2`; sinks protected.
    """
    k, v = np.asarray(k, np.float64), np.asarray(v, np.float64)
    (heads, _, width), (kv_heads, length, _) = q.shape, k.shape
    positions = resolve_positions(positions, length)
    plain = rotate(q, positions, inv_freq, inverse=True)[:, n_sink:]
    start = positions[-1] + 1
    future = [rotation((start + step) * inv_freq) for step in range(n_future)]
    turn = np.mean(future, axis=0)
    expected = np.zeros((heads, length - n_sink))
    for h in range(heads):
        keys = k[h // (heads // kv_heads), n_sink:]
        mean = plain[h].mean(0)
        centred = plain[h] - mean
        covariance = turn @ (centred.T @ centred / len(centred)) @ turn.T
        logits = keys @ (turn @ mean) / np.sqrt(width)
        if use_covariance:
            logits += 0.5 * ((keys @ covariance) * keys).sum(-1) / width
        expected[h] = softmax(logits)
    scores = np.full((kv_heads, length), np.inf)
    tail = group_mean(expected, kv_heads)
    if use_vnorm:
        tail = (tail + epsilon) * np.linalg.norm(v[:, n_sink:], axis=-1)
    scores[:, n_sink:] = tail
    return scores


def _lag_block(block: np.ndarray, following: np.ndarray) -> np.ndarray:
    low, high = following.min(0), following.max(0)
    normalised = (block - low) / (high - low)
    return softmax(normalised.std(axis=-1, ddof=1))


def score_lagkv(q, k, v, *, n_sink: int = 4, lag: int = 128) -> np.ndarray:
    """Rank of a token in its block by the spread of its normalised channels.

    Source: METHODS A 1.1, kvpress `lagkv_press.py`: blocks of `lag` tokens after the
    sinks, normalised by the per-channel range of the next block; unbiased std over
    channels; softmax in the block; mean of keys and values; rank / lag. Sinks, last
    full block and remainder protected. Shorter than `n_sink + 2 lag`: a recency ramp.
    """
    del q
    k, v = np.asarray(k, np.float64), np.asarray(v, np.float64)
    kv_heads, length, _ = k.shape
    scores = np.full((kv_heads, length), np.inf)
    if length < n_sink + 2 * lag:
        scores[:, n_sink:] = np.arange(length - n_sink) / (length - n_sink)
        return scores
    n_blocks = (length - n_sink) // lag
    for head in range(kv_heads):
        for i in range(n_blocks - 1):
            here = slice(n_sink + i * lag, n_sink + (i + 1) * lag)
            after = slice(n_sink + (i + 1) * lag, n_sink + (i + 2) * lag)
            of_keys = _lag_block(k[head, here], k[head, after])
            of_values = _lag_block(v[head, here], v[head, after])
            mean = (of_keys + of_values) / 2
            scores[head, here] = mean.argsort(kind="stable").argsort() / lag
    return scores


def _share_of_block(x: np.ndarray, width: int) -> np.ndarray:
    shares = np.empty_like(x)
    for start in range(0, len(x), width):
        block = x[start : start + width]
        shares[start : start + width] = block / block.sum()
    return shares


def score_cur(q, k, v, *, num_sinks: int = 4, window: int = 16) -> np.ndarray:
    """Product of the local leverage of key and value.

    Source: METHODS A 1.1, kvpress `cur_press.py` (`kv_product`, no random projection):
    squared norms, each divided by its sum in its block of `window` tokens,
    multiplied, normalised to sum one; sinks protected.
    """
    del q
    k, v = np.asarray(k, np.float64), np.asarray(v, np.float64)
    scores = np.empty(k.shape[:2])
    for head in range(k.shape[0]):
        of_keys = _share_of_block((k[head] ** 2).sum(-1), window)
        of_values = _share_of_block((v[head] ** 2).sum(-1), window)
        product = of_keys * of_values
        scores[head] = product / product.sum()
    return protect(scores, slice(0, num_sinks))


def score_criticalkv(
    base: np.ndarray,
    v,
    w_o,
    n: int,
    *,
    epsilon: float = 1e-4,
    first_stage: float = 0.5,
) -> np.ndarray:
    """`base [K, S]` reweighted by what a value contributes to the layer's output.

    Source: METHODS A 1.1, kvpress `criticalkv_press.py`: the first
    `int(first_stage * n)` tokens by `base` are protected, the others get
    `(base + epsilon) * mean_group ||W_O v||_1`. `n` is the number of tokens kept;
    `w_o [H, D, E]`.
    """
    norms = value_output_norm(v, w_o)
    scores = (base + epsilon) * norms
    for head in range(base.shape[0]):
        scores[head, top(base[head], int(first_stage * n))] = np.inf
    return scores
