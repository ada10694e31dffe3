"""Reference merging: what dropped tokens leave behind in those that are kept.

Sources: CaM (openreview LCTmppB165) as kvpress 0.5.5 `cam_press.py` has it; D2O
(2406.13035), a softmax over similarities in which the receiver's own is 1 (METHODS C);
what its repository does otherwise is said below. Per KV head; `kept [K, S]` is a mask
of held tokens, the other held tokens (`positions >= 0`) are dropped. Returned arrays
have all slots; those of dropped tokens are left as they were.
"""

import numpy as np

from .held import turn


def _by_position(mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
    slots = np.flatnonzero(mask)
    return slots[np.argsort(positions[slots], kind="stable")]


def cam_values(
    v, received, kept, *, positions, budget: int = 32, candidates=None
) -> np.ndarray:
    """Values `[K, S, D]` after CaM; keys stay as they are.

    A dropped value, divided by `m`, goes to each of the `m` kept tokens that follow it
    by position: `budget` of them, fewer near the end, none after the last. It counts
    `clip(A_i / mean(A of those m), 0, 1)` with `received [K, S]` the attention received
    so far (0/0 is 0, x/0 is 1). The paper and kvpress draw 0 or 1 with that
    probability; this is the expectation. All dropped tokens merge, or those in
    `candidates [K, S]` (kvpress: the best-scored as many as steps since the last
    compression). Only values as they were before are given away.
    """
    v, received = np.asarray(v, np.float64), np.asarray(received, np.float64)
    positions, kept = np.asarray(positions), np.asarray(kept)
    merged = v.copy()
    for n in range(v.shape[0]):
        dropped = (positions[n] >= 0) & ~kept[n]
        if candidates is not None:
            dropped &= candidates[n]
        stay = _by_position(kept[n], positions[n])
        for i in np.flatnonzero(dropped):
            to = stay[positions[n, stay] > positions[n, i]][:budget]
            if len(to) == 0 or received[n, i] <= 0:
                continue
            mean = received[n, to].mean()
            share = min(1.0, received[n, i] / mean) if mean > 0 else 1.0
            merged[n, to] += share * v[n, i] / len(to)
    return merged


def nearest_kept(k, kept, *, positions) -> tuple[np.ndarray, np.ndarray]:
    """Slot `[K, S]` of the kept key most like each dropped one, and their cosine.

    Keys as held (after RoPE, each at its own position); ties: lower position. -1 and
    -inf where the slot is not a dropped token or nothing is kept.
    """
    k, positions, kept = np.asarray(k, np.float64), np.asarray(positions), kept > 0
    norms = np.sqrt((k**2).sum(-1, keepdims=True))
    unit = k / np.where(norms > 0, norms, 1.0)
    slots = np.full(positions.shape, -1)
    cosines = np.full(positions.shape, -np.inf)
    for n in range(k.shape[0]):
        stay = _by_position(kept[n], positions[n])
        for i in np.flatnonzero((positions[n] >= 0) & ~kept[n]):
            if len(stay):
                like = unit[n, stay] @ unit[n, i]
                slots[n, i], cosines[n, i] = stay[np.argmax(like)], like.max()
    return slots, cosines


def d2o_threshold(
    cosines: np.ndarray, previous: np.ndarray | None = None, *, alpha: float = 0.5
) -> np.ndarray:
    """Threshold per KV head `[K]`: the mean of the dropped tokens' cosines.

    Later: `alpha * previous + (1 - alpha) * mean` (0.5 in the repository). A head that
    dropped nothing keeps `previous` (-inf at first). The repository has one threshold
    for all heads of a layer; here each head has its own.
    """
    result = np.full(cosines.shape[0], -np.inf)
    for n, row in enumerate(cosines):
        found = row[np.isfinite(row)]
        if previous is not None and np.isfinite(previous[n]):
            result[n] = previous[n]
        if len(found):
            old = result[n]
            mean = found.mean()
            result[n] = alpha * old + (1 - alpha) * mean if np.isfinite(old) else mean
    return result


def d2o_merge(
    k,
    v,
    kept,
    *,
    positions,
    frequencies=None,
    previous: np.ndarray | None = None,
    alpha: float = 0.5,
    margin: float = 1e-12,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys, values and thresholds `[K]` after D2O.

    A dropped token whose cosine to its nearest kept key is at least the threshold
    (`margin` under it: a lone dropped token is its own mean) goes into that key's
    token; the others are lost. With `E` the sum of `exp(cos)` over what a receiver
    gets: itself `e / (e + E)`, each other `exp(cos) / (e + E)`, for key and value
    alike. A given key is first turned from its position to the receiver's
    (`frequencies`; None leaves it as it is, as the repository does). Any kept token may
    receive. The repository's code differs: it takes the plain mean of the receiver and
    of `cos` times each given vector (whose weights do not sum to one), and decides by
    the mean cosine over the heads.
    """
    k, v = np.asarray(k, np.float64), np.asarray(v, np.float64)
    positions = np.asarray(positions)
    slots, cosines = nearest_kept(k, kept, positions=positions)
    thresholds = d2o_threshold(cosines, previous, alpha=alpha)
    new_k, new_v = k.copy(), v.copy()
    for n in range(k.shape[0]):
        goes = np.isfinite(cosines[n]) & (cosines[n] >= thresholds[n] - margin)
        for j in np.unique(slots[n][goes]):
            given = np.flatnonzero(goes & (slots[n] == j))
            weights = np.exp(np.append(cosines[n, given], 1.0))
            weights /= weights.sum()
            keys = k[n, given]
            if frequencies is not None:
                keys = turn(keys, positions[n, j] - positions[n, given], frequencies)
            new_k[n, j] = weights[-1] * k[n, j] + weights[:-1] @ keys
            new_v[n, j] = weights[-1] * v[n, j] + weights[:-1] @ v[n, given]
    return new_k, new_v, thresholds
