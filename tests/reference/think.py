"""Reference ThinK: the key channels that the last queries do not look at.

Source: ThinK (2407.21018) as kvpress 0.5.5 `think_press.py` does it: a channel's score
is the mean of `q^2` over the last `window` queries (after RoPE) and over the group,
times the mean of `k^2` over the tokens. The paper's score is the norm of the channel's
part of `Q K'`, the product of two norms per query head; kvpress averages the squares
over the group first. All tokens lose the channels (the paper spares the recent window).
"""

import numpy as np

from .base import group_mean
from .held import last_queries


def think_channel_scores(q, k, *, positions, q_positions, window: int = 32):
    """Scores `[K, D]`: mean of `q^2` (window, group) times mean of `k^2` (held).

    Fewer than `window` queries: all of them.
    """
    q, _ = last_queries(np.asarray(q, np.float64), q_positions, window)
    k = np.asarray(k, np.float64)
    of_queries = group_mean((q**2).mean(axis=1), k.shape[0])
    of_keys = [(k[n][positions[n] >= 0] ** 2).mean(axis=0) for n in range(k.shape[0])]
    return of_queries * np.stack(of_keys)


def think_kept_channels(scores: np.ndarray, ratio: float) -> np.ndarray:
    """Mask `[K, D]` of the `D - int(D * ratio)` best channels; ties: lower index."""
    width = scores.shape[1]
    kept = np.zeros(scores.shape, bool)
    for head, row in enumerate(scores):
        order = np.argsort(-row, kind="stable")
        kept[head, order[: width - int(width * ratio)]] = True
    return kept


def think_keys(k, kept: np.ndarray) -> np.ndarray:
    """Keys `[K, S, D]` with zeros in the channels that are not kept."""
    return np.where(kept[:, None], np.asarray(k, np.float64), 0.0)
