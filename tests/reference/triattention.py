"""Reference TriAttention: keys scored by what typical queries will make of them.

Source: TriAttention (2604.04921) as LANDSCAPE 1.4 has it, and its repository
(`pruning_utils.py`, `triattention.py`). A query or key before RoPE is `D/2` complex
numbers, channel `c` the real and `c + D/2` the imaginary part of pair `c`. No attention
weights; the statistics come from a calibration pass.
"""

import numpy as np

from .held import turn


def pairs(x: np.ndarray) -> np.ndarray:
    """`[..., D]` as complex `[..., D/2]`."""
    half = x.shape[-1] // 2
    return x[..., :half] + 1j * x[..., half:]


def query_statistics(q, q_positions, frequencies) -> tuple[np.ndarray, np.ndarray]:
    """Mean `[H, D/2]` (complex) and mean absolute value of the queries' pairs.

    `q [H, T, D]` after RoPE is turned back first; queries at -1 (padding) do not count.
    """
    q, q_positions = np.asarray(q, np.float64), np.asarray(q_positions)
    real = q_positions >= 0
    plain = pairs(turn(q[:, real], -q_positions[real][None], frequencies))
    return plain.mean(axis=1), np.abs(plain).mean(axis=1)


def triattention_head_scores(
    k,
    mean: np.ndarray,
    mean_abs: np.ndarray,
    *,
    positions,
    frequencies,
    start: int,
    n_offsets: int = 16,
    scaling: np.ndarray | float = 1.0,
    over: str = "mean",
) -> np.ndarray:
    """Scores `[H, S]` per query head.

    `sum_f s_f^2 [ |q_f| |k_f| cos((t - p + d) w_f + arg(q_f conj(k_f)))
    + (E|q|_f - |q_f|) |k_f| ]`, `over` ("mean" or "max") the offsets
    `d = 1, 2, 4 .. 2^(n_offsets - 1)`, with `q_f` the mean pair, `k_f` the key's pair
    turned back from its position `p`, `t = start` the position of the next token and
    `s_f = scaling` (RoPE's attention factor: 1 but for YaRN). The first term is the dot
    product of the mean query at `t + d` with the key. The repository's offsets go up
    to 65536, which are 17.
    """
    k, positions = np.asarray(k, np.float64), np.asarray(positions)
    size = mean.shape[0] // k.shape[0]
    offsets = 2.0 ** np.arange(n_offsets)
    scores = np.zeros((mean.shape[0], k.shape[1]))
    for h in range(mean.shape[0]):
        p = positions[h // size]
        keys = pairs(turn(k[h // size], -p, frequencies))
        phase = np.angle(mean[h] * keys.conj())
        waves = []
        for offset in offsets:
            angle = (start - p + offset)[:, None] * frequencies + phase
            part = np.abs(mean[h]) * np.abs(keys) * np.cos(angle)
            waves.append((scaling**2 * part).sum(-1))
        extra = (mean_abs[h] - np.abs(mean[h])) * np.abs(keys)
        wave = np.max(waves, axis=0) if over == "max" else np.mean(waves, axis=0)
        scores[h] = wave + (scaling**2 * extra).sum(-1)
    return scores


def triattention_scores(
    k,
    mean: np.ndarray,
    mean_abs: np.ndarray,
    *,
    positions,
    frequencies,
    start: int,
    group: str = "mean",
    normalise: bool = False,
    **arguments,
) -> np.ndarray:
    """Scores `[K, S]`: plain mean over the group; free slots -inf, nothing protected.

    The repository's choices per layer and head are `group="max"` of scores that are
    `normalise`d (its command line's default): less their mean over the held tokens,
    by their (biased) deviation, at least 1e-6, per query head.
    """
    positions = np.asarray(positions)
    scores = triattention_head_scores(
        k,
        mean,
        mean_abs,
        positions=positions,
        frequencies=frequencies,
        start=start,
        **arguments,
    )
    size = len(scores) // len(positions)
    if normalise:
        for h, row in enumerate(scores):
            held = row[positions[h // size] >= 0]
            scores[h] = (row - held.mean()) / max(held.std(), 1e-6)
    grouped = scores.reshape(len(positions), size, -1)
    result = grouped.max(axis=1) if group == "max" else grouped.mean(axis=1)
    return np.where(positions >= 0, result, -np.inf)
