"""Scores that look at positions alone: random and StreamingLLM."""

import dataclasses
from typing import final

import jax
import jax.numpy as jnp

from kvjax.scorers._trackers import ContentTracker
from kvjax.scorers.base import (
    AbstractScorer,
    positive_int,
    protect_first,
    row_keys,
    to_kv_heads,
)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(AbstractScorer):
    """Uniform scores: the floor every other method has to beat.

    Attributes:
        seed: of the draw. A token's score depends on the seed, the layer, the head,
            its position and the row's length, never on the rest of the batch.

    Source: kvpress `RandomPress`.
    """

    seed: int = 0

    def observe(self, inputs, lengths, column_mass):
        del column_mass
        kv_heads, tokens = inputs.k.shape[1:3]

        def one(key):
            def draw(position):
                at = jax.random.fold_in(key, position)
                return jax.random.uniform(at, (kv_heads,))

            return jax.vmap(draw, out_axes=1)(jnp.arange(tokens))

        return jax.vmap(one)(row_keys(self.seed, inputs.depth.layer, lengths))


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingLLM(AbstractScorer):
    """Attention sinks and the newest tokens.

    Attributes:
        n_sink: first tokens that are always kept.

    Source: StreamingLLM (2309.17453); kvpress `StreamingLLMPress`.
    Deviations: positions are kept as they were (the paper re-indexes them).
    """

    n_sink: int = 4

    def __post_init__(self):
        positive_int("n_sink", self.n_sink, 0)

    @property
    def protected(self):
        return self.n_sink

    def observe(self, inputs, lengths, column_mass):
        del lengths, column_mass
        kv_heads = inputs.k.shape[1]
        scores = to_kv_heads(inputs.positions.astype(jnp.float32), kv_heads)
        return protect_first(scores, self.n_sink)

    def tracker(self, interval):
        return ContentTracker(interval=interval, score="recency", n_sink=self.n_sink)
