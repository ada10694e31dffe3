"""Scores that look at positions alone: random and StreamingLLM."""

import dataclasses
from typing import ClassVar, final

import jax
import jax.numpy as jnp

from kvjax.fields import Count, Seed
from kvjax.scorers.base import AbstractScorer, protect_first, row_keys


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(AbstractScorer):
    """Uniform scores: the floor every other method has to beat.

    Attributes:
        seed: of the draw. A token's score depends on the seed, the layer, the head,
            its position and the row's length, never on the rest of the batch.

    Source: kvpress `RandomPress`.
    """

    seed: Seed = 0
    exact: ClassVar[bool] = True

    def score(self, memory, held, counts):
        del memory, counts
        kv_heads = held.k.shape[1]

        def draw(key, position):  # of all heads
            return jax.random.uniform(jax.random.fold_in(key, position), (kv_heads,))

        def shared(key, positions):  # of a row whose heads hold the same
            return jax.vmap(draw, (None, 0), out_axes=1)(key, positions[0])

        def apart(key, positions):
            drawn = jax.vmap(jax.vmap(draw, (None, 0)), (None, 0))(key, positions)
            return jnp.einsum("KSK->KS", drawn)

        keys = row_keys(self.seed, held.layer, held.seen)
        places = jnp.maximum(held.positions, 0)
        return jax.vmap(shared if held.in_order else apart)(keys, places)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingLLM(AbstractScorer):
    """Attention sinks and the newest tokens.

    Attributes:
        n_sink: first tokens that are always kept.

    Source: StreamingLLM (2309.17453); kvpress `StreamingLLMPress`.
    Deviations: positions are kept as they were (the paper re-indexes them).
    """

    n_sink: Count = 4
    exact: ClassVar[bool] = True
    per_head: ClassVar[bool] = True

    @property
    def protected(self):
        return self.n_sink

    def score(self, memory, held, counts):
        del memory, counts
        return protect_first(held.positions.astype(jnp.float32), held, self.n_sink)
