"""Reference R-KV: attention less likeness to the other keys.

Source: R-KV (2505.24133) and its repository (`rkv/compression/r1_kv.py`,
`rkv/utils.py`): `lambda * importance - (1 - lambda) * redundancy`, `lambda` 0.1 in the
paper (0.07 is the default of the repository's class), the last 8 tokens protected.
"""

import numpy as np

from .held import last_queries, masked_softmax, pool, similarity, visible


def rkv_importance(
    q,
    k,
    *,
    positions,
    q_positions,
    window: int = 8,
    kernel: int = 7,
    group: str = "max",
    by: str = "rank",
    sliding: int | None = None,
    **options,
) -> np.ndarray:
    """`[K, S]`: the window's attention to the tokens before it; 0 elsewhere.

    As in the repository: the group's logits become one (`group="max"`, their maximum;
    "mean", as its function also offers), softmax over the tokens before the window only
    (so a row sums to one), mean over the window's queries, max pool among those tokens.
    `options`: `scale`, `softcap`.
    """
    q, at = last_queries(np.asarray(q, np.float64), q_positions, window)
    positions = np.asarray(positions)
    logits = similarity(q, k, **options)
    logits = logits.reshape(k.shape[0], -1, *logits.shape[1:])
    logits = logits.max(axis=1) if group == "max" else logits.mean(axis=1)
    result = np.zeros(positions.shape)
    for n in range(k.shape[0]):
        before = (positions[n] >= 0) & (positions[n] < at[0])
        allowed = visible(at, positions[n], sliding) & before
        mean = masked_softmax(logits[n], allowed).mean(axis=0)
        where = np.where(before, positions[n], -1)
        result[n] = pool(mean, where, kernel=kernel, how="max", by=by) * before
    return result


def rkv_redundancy(
    k, *, positions, threshold: float = 0.5, quirk: bool = False
) -> np.ndarray:
    """`[K, S]`: softmax over the held tokens of a key's mean cosine to all keys.

    All held keys of the KV head take part, the window's as well, as they are (after
    RoPE). Cosines of a key with itself are 0. For each key `i`, of the keys whose
    cosine with it is above `threshold` the one at the highest position is spared: that
    one entry `(i, j)` becomes 0, so of a group of alike keys the newest is least
    redundant.
    Then the mean over `i` (all held, zeros included) and a softmax over the tokens.
    Negative cosines stay. `quirk`: a key that is like no other spares the first held
    token instead, which the repository's code does (and which shields that token).
    Free slots: 0.
    """
    k, positions = np.asarray(k, np.float64), np.asarray(positions)
    result = np.zeros(positions.shape)
    for n in range(k.shape[0]):
        slots = np.flatnonzero(positions[n] >= 0)
        slots = slots[np.argsort(positions[n, slots], kind="stable")]
        norms = np.sqrt((k[n, slots] ** 2).sum(-1, keepdims=True))
        unit = k[n, slots] / np.where(norms > 0, norms, 1.0)
        cosines = unit @ unit.T
        np.fill_diagonal(cosines, 0.0)
        for i, row in enumerate(cosines.copy()):
            alike = np.flatnonzero(row > threshold)
            if len(alike):
                cosines[i, alike[-1]] = 0.0
            elif quirk:
                cosines[i, 0] = 0.0
        mean = cosines.mean(axis=0)
        result[n, slots] = masked_softmax(mean, np.ones(mean.shape, bool))
    return result


def rkv_scores(
    q,
    k,
    *,
    positions,
    q_positions,
    window: int = 8,
    kernel: int = 7,
    mix: float = 0.1,
    threshold: float = 0.5,
    quirk: bool = False,
    **options,
) -> np.ndarray:
    """`mix * importance - (1 - mix) * redundancy`; the window +inf, free slots -inf."""
    positions = np.asarray(positions)
    _, at = last_queries(q, q_positions, window)
    importance = rkv_importance(
        q,
        k,
        positions=positions,
        q_positions=q_positions,
        window=window,
        kernel=kernel,
        **options,
    )
    redundancy = rkv_redundancy(
        k, positions=positions, threshold=threshold, quirk=quirk
    )
    scores = mix * importance - (1 - mix) * redundancy
    scores = np.where(positions >= at[0], np.inf, scores)
    return np.where(positions >= 0, scores, -np.inf)
