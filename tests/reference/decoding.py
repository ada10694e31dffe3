"""Reference decode-time eviction: H2O, one token at a time."""

import dataclasses

import numpy as np

from .base import attention, softmax


@dataclasses.dataclass
class H2OTrace:
    """What the loop did.

    Attributes:
        outputs: attention output of every decode step, `[H, steps, D]`.
        kept: after the prompt and after each step, sorted positions per KV head.
        scores: the accumulated scores of those positions, same nesting.
    """

    outputs: np.ndarray
    kept: list[list[np.ndarray]]
    scores: list[list[np.ndarray]]


def _evict(positions, scores, heavy: int, recent: int):
    """The `heavy` best of the old tokens plus the newest `recent`."""
    if len(positions) <= heavy + recent:
        return positions, scores
    n_old = len(positions) - recent
    best = np.sort(np.argsort(-scores[:n_old], kind="stable")[:heavy])
    stay = np.concatenate([best, np.arange(n_old, len(positions))])
    return positions[stay], scores[stay]


def h2o_decode(q, k, v, *, prompt: int, heavy: int, recent: int) -> H2OTrace:
    """H2O over given `q, k, v`: the first `prompt` tokens at once, then one by one.

    Source: METHODS A 1.4, H2O "real drop": column sums of the prompt's attention; then
    each step appends its token, attends over what is left (itself included), adds
    its weights to the scores, and evicts down to `heavy + recent` (one token per
    step): the newest `recent` stay, and the `heavy` best of the others. Scores are
    summed over the query group (the original has one query head per KV head).
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (heads, total, width), kv_heads = q.shape, k.shape[0]
    size = heads // kv_heads
    weights = attention(q[:, :prompt], k[:, :prompt]).sum(axis=1)
    outputs = np.zeros((heads, total - prompt, width))
    state = []
    for n in range(kv_heads):
        received = weights[n * size : (n + 1) * size].sum(axis=0)
        state.append(_evict(np.arange(prompt), received, heavy, recent))
    kept, scores = [[s[0] for s in state]], [[s[1] for s in state]]
    for t in range(prompt, total):
        for n in range(kv_heads):
            positions = np.append(state[n][0], t)
            received = np.append(state[n][1], 0.0)
            for h in range(n * size, (n + 1) * size):
                row = softmax(k[n, positions] @ q[h, t] / np.sqrt(width))
                outputs[h, t - prompt] = row @ v[n, positions]
                received = received + row
            state[n] = _evict(positions, received, heavy, recent)
        kept.append([s[0] for s in state])
        scores.append([s[1] for s in state])
    return H2OTrace(outputs=outputs, kept=kept, scores=scores)
