"""Reference budgets per layer and head: CAKE, LAVa, AdaKV over all layers.

Sources: CAKE (2503.12491) and its authors' repository (`modify_llama.py`,
`cake_cache.py`), LAVa (EMNLP 2025 Findings) and its repository (`snapkv_utils.py`,
`adaptive_mistral_hijack_lava.py`), AdaKV (2407.11550); METHODS A and C. "The window"
is the last `window` queries by position, "before the window" are the held tokens at
lower positions than all of them; the tokens of the window are protected and no budget
counts them (both repositories: `(capacity - window) * layers` is shared).
"""

import numpy as np

from .base import group_mean
from .held import attention_to_held, best, last_queries, pool


def window_attention(q, k, *, positions, q_positions, window: int, **options):
    """Weights `[H, W, S]` of the last `window` queries, and what lies before them.

    Softmax over all that a query sees, window included; `before [K, S]` says which
    slots hold a token before the window. `options`: `scale`, `softcap`, `sliding`.
    """
    q, at = last_queries(np.asarray(q, np.float64), q_positions, window)
    positions = np.asarray(positions)
    weights = attention_to_held(q, k, positions=positions, q_positions=at, **options)
    return weights, (positions >= 0) & (positions < at[0])


def _scores_of(before: np.ndarray, positions: np.ndarray, rows: np.ndarray):
    """`rows` before the window, +inf in it, -inf in free slots."""
    other = np.where(np.asarray(positions) >= 0, np.inf, -np.inf)
    return np.where(before, rows, other)


# CAKE


def cake_preference(
    q,
    k,
    *,
    positions,
    q_positions,
    window: int = 32,
    tau1: float = 1.0,
    tau2: float = 1.0,
    **options,
) -> tuple[float, float, float]:
    """`P = H^(1/tau1) * V^(1/tau2)` of a layer; returns `(P, H, V)`.

    As in the repository: `H` is the entropy `-a log a` of each window query's weights
    before the window, as they are (they do not sum to one, the window's share is
    missing); `V` the unbiased variance of a token's weight over the window's queries,
    summed over the tokens before. The repository sums both over query heads (and `H`
    over queries); here `H` is the mean over query heads and queries and `V` the mean
    over query heads: factors that all layers share and that no budget shows.
    """
    weights, before = window_attention(
        q, k, positions=positions, q_positions=q_positions, window=window, **options
    )
    size = weights.shape[0] // before.shape[0]
    entropies, variances = [], []
    for h, rows in enumerate(weights):
        a = rows[:, before[h // size]]
        logs = np.log(np.where(a > 0, a, 1.0))
        entropies.append(-(a * logs).sum() / len(a))
        variances.append(a.var(axis=0, ddof=1).sum())
    entropy, variance = float(np.mean(entropies)), float(np.mean(variances))
    return entropy ** (1 / tau1) * variance ** (1 / tau2), entropy, variance


def cake_scores(
    q,
    k,
    *,
    positions,
    q_positions,
    window: int = 32,
    gamma: float = 200.0,
    kernel: int = 5,
    by: str = "rank",
    **options,
) -> np.ndarray:
    """Token scores `[K, S]`: mean + `gamma` * variance over the window, pooled.

    Per query head: mean and unbiased variance over the window's queries, average pool
    (the zero padding counts) among the tokens before the window, then the mean over
    the group.
    """
    weights, before = window_attention(
        q, k, positions=positions, q_positions=q_positions, window=window, **options
    )
    size = weights.shape[0] // before.shape[0]
    pooled = []
    for h, rows in enumerate(weights):
        where = np.where(before[h // size], np.asarray(positions)[h // size], -1)
        raw = rows.mean(axis=0) + gamma * rows.var(axis=0, ddof=1)
        pooled.append(pool(raw, where, kernel=kernel, how="mean", by=by))
    rows = group_mean(np.stack(pooled), before.shape[0])
    return _scores_of(before, positions, rows)


def _positive(preference) -> np.ndarray:
    """Preferences, at least a billionth of the largest; all 1 where all are 0."""
    preference = np.asarray(preference, np.float64)
    if preference.max() == 0:
        return np.ones_like(preference)
    return np.maximum(preference, 1e-9 * preference.max())


def shares(
    preference: np.ndarray, total: int, *, least: int, most: int | np.ndarray
) -> np.ndarray:
    """Real shares `[L]` of `total` in proportion to `preference`, within bounds.

    `clip(x * preference, least, most)` with the `x` that makes the sum `total`: what a
    layer cannot take goes to the others in proportion (the CAKE repository hands it on
    in equal parts). Where all together hold less than `total`, each gets `most`. A
    preference of 0 counts as a billionth of the largest.
    """
    preference = _positive(preference)
    most = np.broadcast_to(most, preference.shape).astype(np.float64)
    low = np.minimum(float(least), most)
    if total >= most.sum():
        return most.copy()
    if total < low.sum():
        raise ValueError(f"{total} tokens do not give {len(low)} layers {least} each")
    factors = np.concatenate([low, most]) / np.tile(preference, 2)
    edges = np.unique(np.concatenate([[0.0], factors]))
    sums = [np.clip(x * preference, low, most).sum() for x in edges]
    last = int(np.flatnonzero(np.array(sums) <= total)[-1])
    given = np.clip(edges[last] * preference, low, most)
    free = factors[: len(low)] <= edges[last]
    free &= factors[len(low) :] > edges[last]
    if free.any():
        given[free] += (total - sums[last]) * preference[free] / preference[free].sum()
    return given


def largest_remainder(
    preference: np.ndarray, total: int, *, least: int, most: int | np.ndarray
) -> np.ndarray:
    """Whole budgets `[L]`: `shares` cut to whole numbers, the rest by fraction.

    What the cutting leaves goes one each to the largest fractions; ties: lower layer.
    """
    exact = shares(preference, total, least=least, most=most)
    exact = np.where(np.abs(exact - exact.round()) < 1e-9, exact.round(), exact)
    budgets = np.floor(exact).astype(int)
    room = np.broadcast_to(most, exact.shape) - budgets
    left = min(total, int(np.broadcast_to(most, exact.shape).sum())) - budgets.sum()
    order = np.lexsort((np.arange(len(exact)), -(exact - budgets)))
    for layer in [n for n in order if room[n] > 0][:left]:
        budgets[layer] += 1
    return budgets


def highest_averages(
    preference: np.ndarray, total: int, *, least: int, most: int | np.ndarray
) -> np.ndarray:
    """Whole budgets `[L]` that never grow when a layer is added: Webster's rule.

    From `least` on, one token at a time to the layer with the largest `preference /
    (budget + 1/2)`; ties: lower layer. Differs from `largest_remainder` by a token here
    and there. `largest_remainder` may give a layer more although another one came to
    share the same total, and a token that has been dropped does not come back.
    """
    preference = _positive(preference)
    most = np.broadcast_to(most, preference.shape).astype(int)
    budgets = np.minimum(least, most)
    if total < budgets.sum():
        raise ValueError(f"{total} tokens do not give {len(most)} layers {least} each")
    for _ in range(min(total, most.sum()) - budgets.sum()):
        averages = np.where(budgets < most, preference / (budgets + 0.5), -1.0)
        budgets[np.argmax(averages)] += 1
    return budgets


def _flat_top(scores, positions, allowed, n: int) -> np.ndarray:
    """Mask `[..., S]` of the `n` best `allowed`; ties: lower head, then position."""
    flat = np.flatnonzero(allowed)
    heads = np.broadcast_to(
        np.arange(np.prod(scores.shape[:-1])).reshape(*scores.shape[:-1], 1),
        scores.shape,
    )
    keys = (positions.ravel()[flat], heads.ravel()[flat], -scores.ravel()[flat])
    chosen = np.zeros(scores.size, bool)
    chosen[flat[np.lexsort(keys)[:n]]] = True
    return chosen.reshape(scores.shape)


def keep_in_layer(scores, positions, budget: int, *, flat: bool, within=None):
    """Mask `[K, S]`: the protected (+inf) and the best others among `within`.

    Each KV head gets `budget` others; `flat`: the heads share `K * budget`.
    """
    positions = np.asarray(positions)
    within = np.ones(scores.shape, bool) if within is None else within
    kept = np.isposinf(scores) & within
    others = np.isfinite(scores) & within & (positions >= 0)
    if flat:
        return kept | _flat_top(scores, positions, others, budget * len(scores))
    for head in range(len(scores)):
        where = np.where(others[head], positions[head], -1)
        kept[head, best(scores[head], where, budget)] = True
    return kept


def layers_at_once(
    scores, positions, preference, total: int, *, least, most, flat, rule
):
    """Masks of all layers and budgets `[L]`, all preferences being known."""
    budgets = rule(np.asarray(preference), total, least=least, most=most)
    rows = zip(scores, positions, budgets, strict=True)
    return [keep_in_layer(s, p, int(n), flat=flat) for s, p, n in rows], budgets


def layers_in_cascade(
    scores, positions, preference, total: int, *, least, most, flat, rule
):
    """The same layer by layer: each new layer makes the earlier ones shrink.

    After each layer, budgets are computed among the layers so far on the same `total`
    and each of them keeps its best among what it still has. Returns the masks, the
    budgets after the last layer, and the most tokens there were at any time (`K` heads
    alike). A layer whose budget grows cannot grow: see `highest_averages`.
    """
    masks, budgets, peak = [], np.zeros(0, int), 0
    for new in range(len(scores)):
        masks.append(np.asarray(positions[new]) >= 0)
        peak = max(peak, sum(int(mask.sum()) for mask in masks))
        known = np.asarray(preference)[: new + 1]
        limit = np.broadcast_to(most, (len(scores),))[: new + 1]
        budgets = rule(known, total, least=least, most=limit)
        for layer in range(new + 1):
            masks[layer] = keep_in_layer(
                scores[layer],
                positions[layer],
                int(budgets[layer]),
                flat=flat,
                within=masks[layer],
            )
    return masks, budgets, peak


# LAVa


def lava_scores(
    q,
    k,
    v,
    *,
    positions,
    q_positions,
    window: int = 32,
    kernel: int = 7,
    by: str = "rank",
    **options,
) -> np.ndarray:
    """`max_j ||v_j||_1` times the window's mean attention, pooled; max over the group.

    As in the repository: mean over the window's queries, max pool among the tokens
    before the window, times the largest L1 norm of a value before the window (the
    paper's maximum is over all values), then the maximum over the group.
    """
    weights, before = window_attention(
        q, k, positions=positions, q_positions=q_positions, window=window, **options
    )
    (heads, _, slots), kv_heads = weights.shape, before.shape[0]
    norms = np.abs(np.asarray(v, np.float64)).sum(-1)
    rows = np.zeros((kv_heads, slots))
    for h in range(heads):
        n = h * kv_heads // heads
        where = np.where(before[n], np.asarray(positions)[n], -1)
        mean = weights[h].mean(axis=0)
        pooled = pool(mean, where, kernel=kernel, how="max", by=by)
        rows[n] = np.maximum(rows[n], pooled * norms[n][before[n]].max())
    return _scores_of(before, positions, rows)


def lava_preference(scores: np.ndarray) -> float:
    """Entropy of a layer's finite scores over the log of their number, in [0, 1].

    All heads and tokens before the window are one distribution. Budgets go with it.
    """
    x = scores[np.isfinite(scores)]
    p = x / x.sum()
    return float(-(p * np.log(np.where(p > 0, p, 1.0))).sum() / np.log(len(x)))


# AdaKV over all layers


def adakv_global(scores, positions, mean: int, *, safeguard: float = 0.2):
    """Mask `[L, K, S]` of `L * K * mean` tokens, shared by all heads of all layers.

    Every head surely gets its `max(1, int(safeguard * mean))` best (as kvpress does
    within a layer); the rest goes to the best of all heads of all layers together,
    whatever their scale. Protected tokens (+inf) count and come first; free slots are
    never taken; a head that holds less gives what is left to the others. Ties: lower
    layer, then head, then position.
    """
    scores, positions = np.asarray(scores, np.float64), np.asarray(positions)
    (layers, kv_heads, _), held = scores.shape, positions >= 0
    kept = np.zeros(scores.shape, bool)
    for layer, head in np.ndindex(layers, kv_heads):
        sure = max(1, int(safeguard * mean))
        kept[layer, head, best(scores[layer, head], positions[layer, head], sure)] = 1
    left = layers * kv_heads * mean - int(kept.sum())
    return kept | _flat_top(scores, positions, held & ~kept, left)
