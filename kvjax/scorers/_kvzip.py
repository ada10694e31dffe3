"""KVzip: attention that the prompt receives when the model tells it again."""

import dataclasses
from typing import final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.fields import Count
from kvjax.pallas_kernels.column_stats import column_stats
from kvjax.scorers._replay import AbstractReplay, Retold
from kvjax.types import EMPTY, Keys, LayerInputs, Lengths, Values


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVzip(AbstractReplay):
    """The largest attention weight that a token gets while its chunk is told again.

    The softmax of a replayed query is over the first tokens of the prompt, the chunk
    and the replay so far; the largest weight of all its queries and of the query heads
    of a group counts. The first tokens get the largest score of their row, plus 1.

    Attributes:
        n_sink: first tokens that are part of every softmax and are always kept.

    Cost: a pass over the prompt, in chunks, with attention over prompt and chunk; the
    scores' own softmax is one of `O(chunk)` keys per query more. Memory is linear.
    Source: KVzip (2505.23416); kvpress 0.5.5 `KVzipPress` (chunks of 2048, 4 sinks, an
    overlap of 8).
    Deviations: `ask` is empty unless it is given, and the same for all chunks, where
    the paper asks for later chunks in other words; kvpress puts a chat template's end
    between overlap and chunk. A sliding layer's window is respected, where kvpress
    refuses such models.
    """

    n_sink: Count = 4

    @property
    def protected(self):
        return self.n_sink

    def probe(self, again, tokens, lengths):
        slots = tokens.shape[1]

        def one(number: Array) -> Float[Array, "L B K C"]:
            told = self.retold(number, tokens, lengths)

            def look(asked: LayerInputs, k: Keys, v: Values) -> Array:
                del v
                return largest_weight(asked, k, lengths, told, self.n_sink)

            return again(told.tokens, told.positions, look).looks

        parts = jnp.moveaxis(jax.lax.map(one, self.chunks(slots)), 0, 3)
        scores = parts.reshape(*parts.shape[:3], -1)[..., :slots]
        most = jnp.max(scores, axis=(0, 2, 3), keepdims=True)
        return jnp.where(jnp.arange(slots) < self.n_sink, most + 1, scores)


def largest_weight(
    asked: LayerInputs, k: Keys, lengths: Lengths, told: Retold, n_sink: int
) -> Float[Array, "B K C"]:
    """The largest weight of each token of a chunk over all queries of its group.

    Args:
        asked: a layer's queries and keys of the replay.
        k: the prompt's keys.
        lengths: of the prompts.
        told: the chunk.
        n_sink: first tokens that are seen beside it.
    """
    (b, slots), (chunk,), spec = (len(k), k.shape[2]), told.index.shape, asked.spec
    sinks = jnp.arange(min(n_sink, slots), dtype=jnp.int32)
    index = jnp.concatenate([sinks, told.index])
    # Sinks that are in the chunk count once.
    once = jnp.concatenate([sinks < told.index[0], jnp.ones(chunk, bool)])
    live = once & (index < lengths[:, None])
    keys = jnp.take(k, jnp.minimum(index, slots - 1), axis=2)
    weights = column_stats(
        asked.q,
        jnp.concatenate([keys, asked.k], axis=2),
        asked.positions,
        jnp.concatenate([jnp.where(live, index, EMPTY), asked.positions], axis=1),
        scale=spec.scale,
        window=spec.window,
        softcap=spec.softcap,
    ).max[..., len(sinks) : len(index)]
    return jnp.max(weights.reshape(b, k.shape[1], -1, chunk), axis=2)
