"""LagKV: tokens that stand out against the block that follows them."""

import dataclasses
from typing import Annotated, ClassVar, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.cache import levelled
from kvjax.config import sized
from kvjax.fields import Count, Range
from kvjax.pallas_kernels.partial import feature_sum
from kvjax.scorers.base import AbstractScorer, by_position, protect_first, unsorted


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class LagKV(AbstractScorer):
    """Spread of keys and values after normalisation by the next block.

    Tokens behind the sinks go in blocks of `lag`. Each block is scaled by the
    per-channel range of the next one; the standard deviation over channels, softmaxed
    over the block, is averaged between keys and values and replaced by its rank.
    The last full block, the remainder and the sinks rank above everything.

    Attributes:
        n_sink: first tokens that are always kept.
        lag: tokens per block.

    Source: LagKV (2504.04704); kvpress `LagKVPress` (4, 128, rank inside blocks).
    Deviations: channels whose range is zero are divided by a tiny number instead of
    by 0; the protected blocks prefer newer tokens where the budget cannot hold them.
    """

    n_sink: Count = 4
    lag: Annotated[int, Range(2, 2**16)] = sized(128, short=16)
    exact: ClassVar[bool] = True

    @property
    def protected(self):
        return self.n_sink

    def score(self, memory, held, counts):
        del memory, counts
        there, order = by_position(held)
        s = there.k.shape[2]
        index = jnp.arange(s)
        count = jnp.sum(there.live, axis=-1)[..., None]
        recency = index.astype(jnp.float32) / jnp.maximum(count, 1).astype(jnp.float32)
        blocks = (s - self.n_sink) // self.lag
        full = (count - self.n_sink) // self.lag  # full blocks of each head
        scores = 1.0 + recency
        if blocks >= 2:
            spreads = (self._spread(x, blocks) for x in (there.k, there.v))
            # The mean of two weights, but for its logarithm, which is only ranked.
            both = levelled(jnp.logaddexp(*spreads))
            best = jnp.argsort(-both, axis=-1, stable=True)
            rank = self.lag - 1 - jnp.argsort(best, axis=-1)
            rank = rank.astype(jnp.float32) / self.lag
            ranked = rank.reshape(*rank.shape[:2], -1)
            stop = self.n_sink + ranked.shape[-1]
            lagged = scores.at[..., self.n_sink : stop].set(ranked)
            block = (index - self.n_sink) // self.lag
            scores = jnp.where(block < full - 1, lagged, scores)
        # Too short to have a reference block: keep the newest.
        scores = jnp.where(count < self.n_sink + 2 * self.lag, recency, scores)
        return protect_first(unsorted(scores, order), held, self.n_sink)

    def _spread(self, x: Float[Array, "B K S D"], blocks: int) -> Array:
        """`[B, K, blocks - 1, lag]` logarithms of softmaxed deviations."""
        b, k, _, d = x.shape
        stop = self.n_sink + blocks * self.lag
        x = x[:, :, self.n_sink : stop].astype(jnp.float32)
        x = x.reshape(b, k, blocks, self.lag, d)
        low = jnp.min(x[:, :, 1:], axis=3, keepdims=True)
        high = jnp.max(x[:, :, 1:], axis=3, keepdims=True)
        scaled: Array = (x[:, :, :-1] - low) / jnp.maximum(high - low, 1e-12)
        apart = scaled - feature_sum(scaled)[..., None] / d
        deviation = jnp.sqrt(feature_sum(apart * apart) / (d - 1))
        return jax.nn.log_softmax(deviation, axis=-1)
