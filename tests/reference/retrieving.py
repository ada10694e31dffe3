"""Reference retrieval: what a decoded query reads of a whole prompt, method by method.

One query: `q [H, D]` behind the prompt's `k`, `v [K, S, D]`. Masks are `[K, S]`: the
tokens that each KV head reads, for all query heads of its group.
"""

import numpy as np

from .base import attention, group_size, rotate, softmax, top


def group_of(head: int, q: np.ndarray, k: np.ndarray) -> range:
    """Query heads that read a KV head."""
    size = group_size(q, k)
    return range(head * size, (head + 1) * size)


def exact_topk_mask(q: np.ndarray, k: np.ndarray, n: int) -> np.ndarray:
    """The `n` tokens of most softmax weight, summed over the group.

    Source: the project's definition of the oracle.
    """
    mask = np.zeros(k.shape[:2], bool)
    for head in range(len(k)):
        weight = np.zeros(k.shape[1])
        for h in group_of(head, q, k):
            weight += softmax(k[head] @ q[h] / np.sqrt(q.shape[-1]))
        mask[head, top(weight, n)] = True
    return mask


def infllm_mask(
    q: np.ndarray,
    k: np.ndarray,
    prompt_q: np.ndarray,
    prompt_k: np.ndarray,
    *,
    size: int,
    count: int,
    n_blocks: int,
    sinks: int,
    local: int,
) -> np.ndarray:
    """Tokens of the blocks that are read, `k` being those of whole blocks.

    Source: METHODS C 1.6 (InfLLM): the `count` tokens of a block with the largest
    attention received are its representatives, a block's score is the product of the
    query with their mean; sinks and local tokens are read as well. As kvjax deviates:
    attention of all queries of the prompt, a sum over the group.
    """
    weights = attention(prompt_q, prompt_k)
    position = prompt_k.shape[1]  # of the query
    mask = np.zeros(k.shape[:2], bool)
    for head in range(len(k)):
        received = weights[list(group_of(head, q, k))].sum(axis=(0, 1))
        scores, forced = [], []
        for start in range(0, k.shape[1], size):
            mine = np.arange(start, start + size)
            chosen = mine[top(received[mine], count)]
            mean = k[head, chosen].mean(axis=0)
            scores.append(sum(q[h] @ mean for h in group_of(head, q, k)))
            forced.append(start < sinks or start + size - 1 > position - local)
        scores, forced = np.array(scores), np.array(forced)
        best = top(np.where(forced, -np.inf, scores), n_blocks)
        read = forced.copy()
        read[best] = True
        mask[head] = np.repeat(read, size)
    return mask


def shadowkv_masks(
    q: np.ndarray,
    k: np.ndarray,
    *,
    size: int,
    n_chunks: int,
    outliers: int,
    local: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that are held exactly, and those of the chunks that are read beside them.

    Source: METHODS C 1.5 (ShadowKV): landmarks are means of the keys of a chunk;
    outliers are the chunks with the lowest smallest cosine between a key and its mean;
    the last `local` chunks and the remainder are exact; softmax(q landmarks / sqrt(D)),
    the largest of the group, the top chunks.
    """
    _, length, width = k.shape
    whole = length // size
    exact, read = np.zeros(k.shape[:2], bool), np.zeros(k.shape[:2], bool)
    for head in range(len(k)):
        exact[head, max(whole - local, 0) * size :] = True
        marks, least = [], []
        for chunk in range(max(whole - local, 0)):
            keys = k[head, chunk * size : (chunk + 1) * size]
            mark = keys.mean(axis=0)
            norms = np.linalg.norm(keys, axis=1) * np.linalg.norm(mark)
            marks.append(mark)
            least.append((keys @ mark / norms).min())
        odd = top(-np.array(least), outliers)
        others = np.setdiff1d(np.arange(len(marks)), odd)
        for chunk in odd:
            exact[head, chunk * size : (chunk + 1) * size] = True
        share = np.zeros(len(others))
        for h in group_of(head, q, k):
            logits = np.array(marks)[others] @ q[h] / np.sqrt(width)
            share = np.maximum(share, softmax(logits))
        for chunk in others[top(share, n_chunks)]:
            read[head, chunk * size : (chunk + 1) * size] = True
    return exact, read


def low_rank_after_rope(
    k: np.ndarray, rank: int, inv_freq: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """Keys rebuilt from the leading singular vectors of all heads before RoPE.

    Source: METHODS C 1.5: the heads side by side, `[N, K D]`, truncated to `rank`.
    """
    plain = rotate(k, positions, inv_freq, inverse=True)
    joint = np.concatenate(list(plain), axis=1)
    u, s, vt = np.linalg.svd(joint, full_matrices=False)
    cut = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return rotate(np.stack(np.split(cut, len(k), axis=1)), positions, inv_freq)


def retroinfer_read(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    segment: int,
    cluster: int,
    iterations: int,
    budget: int,
    estimate: int,
    sinks: int,
    local: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that are read, and the output `[H, D]` with what is estimated.

    Source: METHODS C 1.7 (RetroInfer): clusters ranked by the sum over the group of
    softmax(q C); the best are read, the next `estimate` count as size * exp(q c) with
    the mean value, the rest is dropped. As kvjax has it: clusters are read as long as
    their tokens fit `budget` together (larger ones are estimated); what is behind the
    last segment is read; clusters with local tokens are not estimated.
    """
    _, length, width = k.shape
    whole = length // segment * segment
    mask = np.zeros(k.shape[:2], bool)
    out = np.zeros((q.shape[0], width))
    for head in range(len(k)):
        groups = []
        for start in range(0, whole, segment):
            mine = np.arange(max(start, sinks), start + segment)
            how = (start, segment, mine, cluster, iterations)
            found = _segment_clusters(k[head], *how)
            groups += [g for g in found if len(g)]
        centres = np.array([k[head, g].mean(axis=0) for g in groups])
        share = np.zeros(len(groups))
        for h in group_of(head, q, k):
            share += softmax(centres @ q[h] / np.sqrt(width))
        mask[head, :sinks] = mask[head, length + 1 - local :] = True
        mask[head, whole:] = True
        left, total, full = [], 0, False
        for c in top(share, len(groups)):
            size = len(groups[c])
            full = full or (size <= budget and total + size > budget)
            if size <= budget and not full:
                mask[head, groups[c]] = True
                total += size
            else:
                left.append(c)
        estimated = [c for c in left[:estimate] if groups[c].max() <= length - local]
        for h in group_of(head, q, k):
            keys = np.concatenate([k[head, mask[head]], centres[estimated]])
            means = [v[head, groups[c]].mean(axis=0) for c in estimated]
            means = np.reshape(means, (-1, width))
            values = np.concatenate([v[head, mask[head]], means])
            sizes = [len(groups[c]) for c in estimated]
            extra = np.concatenate([np.zeros(mask[head].sum()), np.log(sizes)])
            out[h] = softmax(keys @ q[h] / np.sqrt(width) + extra) @ values
    return mask, out


def _segment_clusters(keys, start, segment, mine, cluster, iterations):
    """Members of each cluster of a segment; `mine` are its tokens that take part.

    Source: METHODS C 1.7: spherical k-means, the centres at first uniformly spaced
    tokens, normalised in each iteration but the last; keys go to the largest cosine.
    """
    count = segment // cluster
    middles = [(2 * c + 1) * len(mine) // (2 * count) for c in range(count)]
    centres = keys[mine[middles]].copy()
    for iteration in range(iterations):
        lengths = np.linalg.norm(centres, axis=1)
        nearest = np.argmax(keys[mine] @ centres.T / lengths, axis=1)
        if iteration < iterations - 1:
            for c in range(count):
                if (nearest == c).any():
                    centres[c] = keys[mine[nearest == c]].sum(axis=0)
    return [mine[nearest == c] for c in range(count)]
