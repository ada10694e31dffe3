"""Reference patterns of sparse prefill: token masks `[H, n, n]` of one prompt.

By METHODS C 1.1-1.3 and the papers; loops over blocks, float64. `q` is `[H, n, D]` and
`k` `[K, n, D]`. A pair counts if its blocks are chosen; `window` is the layer's.
"""

import numpy as np

from .base import group_size, softmax


def tokens_of(blocks: np.ndarray, n: int, block: int, window=None) -> np.ndarray:
    """Pairs of tokens in chosen pairs of blocks, causal and inside of the window."""
    mask = np.zeros((len(blocks), n, n), bool)
    for i in range(n):
        for j in range(i + 1):
            if window is None or i - j < window:
                mask[:, i, j] = blocks[:, i // block, j // block]
    return mask


def seen_blocks(n: int, block: int, window=None) -> np.ndarray:
    """Pairs of blocks in which some token sees some other."""
    everything = np.ones((1, -(-n // block), -(-n // block)), bool)
    mask = tokens_of(everything, n, block, window)[0]
    return pooled(mask.astype(float), block) > 0


def pooled(x: np.ndarray, block: int) -> np.ndarray:
    """Sums of `block` by `block` pieces of a matrix."""
    n = -(-len(x) // block)
    out = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            rows, columns = slice(i * block, (i + 1) * block), slice(j * block, None)
            out[i, j] = x[rows, columns][:, :block].sum()
    return out


def a_shape_mask(n: int, *, first: int, local: int, block: int) -> np.ndarray:
    """StreamingLLM's mask widened to blocks, `[1, n, n]`."""
    near = np.zeros((n, n))
    for i in range(n):
        for j in range(i + 1):
            near[i, j] = j < first or i - j < local
    return tokens_of(pooled(near, block)[None] > 0, n, block)


def tri_shape_mask(n, *, first, local, last, block) -> np.ndarray:
    """The same, but blocks of queries with one of the last see everything."""
    mask = a_shape_mask(n, first=first, local=local, block=block)
    for i in range(n):
        ends = [x for x in range(n) if x // block == i // block and x >= n - last]
        if ends:
            mask[:, i, : i + 1] = True
    return mask


def means(x: np.ndarray, block: int) -> np.ndarray:
    """Mean of each block's tokens, `[N, D]`."""
    return np.stack([x[i : i + block].mean(0) for i in range(0, len(x), block)])


def block_topk_mask(q, k, *, blocks: int, block: int, window=None) -> np.ndarray:
    """Per block of queries its own block and the best others by products of means."""
    (heads, n, d), size = q.shape, group_size(q, k)
    seen = seen_blocks(n, block, window)
    chosen = np.zeros((heads, *seen.shape), bool)
    for h in range(heads):
        score = means(q[h], block) @ means(k[h // size], block).T / np.sqrt(d)
        for i in range(len(seen)):
            ranked = sorted(np.flatnonzero(seen[i]), key=lambda j: -score[i, j])
            others = [j for j in ranked if j != i][: blocks - 1]
            chosen[h, i, [i, *others]] = True
    return tokens_of(chosen, n, block, window)


def reaching(values: np.ndarray, wanted: float) -> np.ndarray:
    """Indices of the largest values, as few as sum to `wanted`."""
    kept, total = [], 0.0
    for index in np.argsort(-values, kind="stable"):
        if total >= wanted:
            break
        kept.append(index)
        total += values[index]
    return np.array(kept, int)


def xattention_mass(q, k, *, stride: int, block: int) -> np.ndarray:
    """Estimated mass of pairs of blocks, `[H, N, N]`.

    Groups of `stride` tokens; queries in reverse order inside a group; softmax over the
    groups of keys up to the query's own; groups of padding alone do not count.
    """
    (heads, n, d), size = q.shape, group_size(q, k)
    groups, per = -(-n // stride), block // stride
    pad = ((0, groups * stride - n), (0, 0))
    out = np.zeros((heads, -(-n // block), -(-n // block)))
    for h in range(heads):
        queries = np.pad(q[h], pad).reshape(groups, stride, d)[:, ::-1]
        keys = np.pad(k[h // size], pad).reshape(groups, stride, d)
        for g in range(groups):
            logits = [np.sum(queries[g] * keys[c]) for c in range(g + 1)]
            weight = softmax(np.array(logits) / (stride * np.sqrt(d)))
            for c in range(g + 1):
                out[h, g // per, c // per] += weight[c]
    return out


def xattention_mask(q, k, *, threshold, stride, block, window=None) -> np.ndarray:
    """The first block, the own one, and the largest up to the threshold."""
    n = q.shape[1]
    mass = xattention_mass(q, k, stride=stride, block=block)
    seen = seen_blocks(n, block, window)
    chosen = np.zeros(mass.shape, bool)
    for h in range(len(mass)):
        for i in range(len(seen)):
            row = np.where(seen[i], mass[h, i], 0)
            always = sorted({0, i})
            others = row.copy()
            others[always] = 0
            wanted = threshold * row.sum() - row[always].sum()
            chosen[h, i, reaching(others, wanted)] = True
            chosen[h, i, always] = True
    return tokens_of(chosen & seen, n, block, window)


def last_weights(q, k, count: int, window=None, softcap=None) -> np.ndarray:
    """Softmax weights of the last `count` queries over the keys they see."""
    n = len(q)
    out = np.zeros((min(count, n), n))
    for at, i in enumerate(range(max(0, n - count), n)):
        low = 0 if window is None else max(0, i - window + 1)
        logits = k[low : i + 1] @ q[i] / np.sqrt(q.shape[-1])
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        out[at, low : i + 1] = softmax(logits)
    return out


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Root of the Jensen-Shannon divergence, natural logarithm."""
    middle, total = (p + q) / 2, 0.0
    for one in (p, q):
        for x, m in zip(one, middle, strict=True):
            total += x * np.log(x / m) / 2 if x > 0 else 0.0
    return np.sqrt(max(total, 0.0))


def flex_prefill_head(
    q, k, *, gamma, tau, least, block, most=None, window=None, softcap=None
):
    """Chosen pairs of blocks of a head `[N, N]`, and its distance."""
    n, d = q.shape
    count = -(-n // block)
    weights = last_weights(q, k, block, window, softcap)
    columns, slash = weights.mean(0), np.zeros(n)
    for at, i in enumerate(range(n - len(weights), n)):
        for j in range(i + 1):
            slash[i - j] += weights[at, j] / len(weights)
    piece = [slice(i * block, (i + 1) * block) for i in range(count)]
    guess = softmax(means(k, block) @ q[-block:].mean(0) / np.sqrt(d))
    true = np.array([columns[x].sum() for x in piece])
    far = divergence(guess, true)
    floor = -(-least // block)
    chosen = np.zeros((count, count), bool)
    for lines, diagonal in ((columns, False), (slash, True)):
        number = max(floor, len(reaching(lines, gamma)) // block + 1)
        if most is not None:
            number = min(number, -(-most // block))
        if far < tau:
            number = floor
        mass = np.array([lines[x].sum() for x in piece])
        mass[0] = np.inf
        for line in np.argsort(-mass, kind="stable")[:number]:
            for i in range(count):
                if diagonal and i >= line:
                    chosen[i, i - line] = True
                if not diagonal:
                    chosen[i, line] = True
    seen = seen_blocks(n, block, window)
    if far < tau:
        score = means(q, block) @ means(k, block).T / np.sqrt(d)
        flat = np.zeros((count, count))
        for i in range(count):
            there = np.flatnonzero(seen[i])
            flat[i, there] = softmax(score[i, there])
        best = reaching(flat.ravel(), gamma * flat.sum())
        chosen.ravel()[best] = True
    return chosen, far


def flex_prefill_mask(q, k, *, block, window=None, **how) -> np.ndarray:
    """Of all heads."""
    size, how = group_size(q, k), {**how, "block": block, "window": window}
    heads = [flex_prefill_head(q[h], k[h // size], **how)[0] for h in range(len(q))]
    return tokens_of(np.stack(heads), q.shape[1], block, window)
