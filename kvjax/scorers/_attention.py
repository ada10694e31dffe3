"""Scores from attention received: SnapKV, TOVA and H2O."""

import dataclasses
from typing import ClassVar, final

import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.pallas_kernels.column_stats import column_stats
from kvjax.scorers._trackers import MassTracker, WindowTracker
from kvjax.scorers.base import (
    AbstractScorer,
    average_pool,
    group_mean,
    last_queries,
    live_tokens,
    positive_int,
    protect_last,
    to_kv_heads,
)
from kvjax.types import LayerInputs, Lengths


def window_mass(
    inputs: LayerInputs, lengths: Lengths, window: int
) -> Float[Array, "B H S"]:
    """Mean attention of the last `window` queries of each row, per query head."""
    queries, positions = last_queries(inputs, lengths, window)
    spec = inputs.spec
    stats = column_stats(
        queries,
        inputs.k,
        positions,
        inputs.positions,
        scale=spec.scale,
        window=spec.window,
        softcap=spec.softcap,
    )
    return stats.sum / window


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV(AbstractScorer):
    """Attention that the last queries pay, smoothed along the sequence.

    Attributes:
        window: queries at the end of the prompt that vote; their own tokens are kept.
        kernel: width of the average pooling.

    Source: SnapKV (2404.14469) section 4; kvpress `SnapKVPress` (window 64, average
    pooling of 5, means over window and group).
    Deviations: the window is protected by `+inf`; rows shorter than the window
    protect all they have.
    """

    window: int = 64
    kernel: int = 5

    def __post_init__(self):
        positive_int("window", self.window)
        positive_int("kernel", self.kernel)

    @property
    def protected(self):
        return self.window

    def observe(self, inputs, lengths, column_mass):
        del column_mass
        mass = window_mass(inputs, lengths, self.window)
        inside = live_tokens(lengths - self.window, mass.shape[-1])
        # The window's own columns are cut off before pooling: zeros at the border.
        pooled = average_pool(jnp.where(inside, mass, 0.0), self.kernel)
        scores = group_mean(pooled, inputs.k.shape[1])
        return protect_last(scores, lengths, self.window)

    def tracker(self, interval):
        return WindowTracker(
            interval=interval, window=self.window, kernel=self.kernel, share_heads=False
        )


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class TOVA(AbstractScorer):
    """Attention of the last query, averaged over all heads; the last token is kept.

    Source: Transformers are Multi-State RNNs (2401.06104); kvpress `TOVAPress`.
    """

    @property
    def protected(self):
        return 1

    def observe(self, inputs, lengths, column_mass):
        del column_mass
        mass = jnp.mean(window_mass(inputs, lengths, 1), axis=1)
        return protect_last(to_kv_heads(mass, inputs.k.shape[1]), lengths, 1)

    def tracker(self, interval):
        return WindowTracker(interval=interval, window=1, kernel=1, share_heads=True)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class H2O(AbstractScorer):
    """Attention mass received from all queries.

    Attributes:
        normalize: divide by the number of queries that could see the token
            (kvpress); the original repository sums, which favours early tokens.
        recent: newest tokens that are always kept.

    Source: H2O (2306.14048) section 4; kvpress `ObservedAttentionPress`
    (`normalize=True`, `recent=0`), the authors' `h2o_hf` (`normalize=False`).
    Deviations: column sums come from the pass itself in O(S) memory.
    """

    needs_column_mass: ClassVar[bool] = True
    normalize: bool = True
    recent: int = 0

    def __post_init__(self):
        positive_int("recent", self.recent, 0)

    @property
    def protected(self):
        return self.recent

    def observe(self, inputs, lengths, column_mass):
        assert column_mass is not None
        scores = group_mean(column_mass, inputs.k.shape[1])
        if self.normalize:
            index = jnp.arange(scores.shape[-1])
            seen_by = jnp.maximum(lengths[:, None, None] - index, 1)
            scores = scores / seen_by.astype(jnp.float32)
        return scores

    def rank(self, observed, counts, lengths):
        del counts
        return protect_last(observed, lengths, self.recent)

    def tracker(self, interval):
        if self.normalize:
            raise ValueError(
                "decode-time H2O accumulates plain sums; got normalize=True. Set "
                "evict.score.normalize=false."
            )
        return MassTracker(interval=interval, recent=self.recent)
