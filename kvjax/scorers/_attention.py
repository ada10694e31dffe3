"""Scores from attention received: SnapKV, TOVA and H2O."""

import dataclasses
from typing import ClassVar, final

import jax.numpy as jnp

from kvjax.cache import Memory
from kvjax.config import sized
from kvjax.fields import Count, Kernel, Size
from kvjax.scorers._window import AbstractWindow
from kvjax.scorers.base import (
    AbstractScorer,
    average_pool,
    group_mean,
    last_queries,
    mass_received,
    ordered,
    position_order,
    protect_last,
    to_kv_heads,
    unsorted,
)
from kvjax.types import Held, Scores


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV(AbstractWindow):
    """Attention that the last queries pay, smoothed along the sequence.

    Attributes:
        window: queries at the end of the prompt that vote; their own tokens are kept.
        kernel: width of the average pooling.

    Source: SnapKV (2404.14469) section 4; kvpress `SnapKVPress` (window 64, average
    pooling of 5, means over window and group).
    Deviations: the window is protected by `+inf`; rows shorter than the window
    protect all they have.
    """

    window: Size = sized(64, short=8, recent=True)
    kernel: Kernel = 5

    def score(self, memory, held, counts):
        del counts
        mass = mass_received(memory.row, held) / self.window
        votes = group_mean(mass, held.k.shape[1])
        return protect_last(self.pooled(votes, held, average_pool), held, self.window)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class TOVA(AbstractScorer):
    """Attention of the last query, averaged over all heads; the last token is kept.

    Source: Transformers are Multi-State RNNs (2401.06104); kvpress `TOVAPress`.
    """

    @property
    def protected(self):
        return 1

    def row(self, asked, before):
        return last_queries(asked, 1, before)

    def score(self, memory, held, counts):
        del counts
        kv_heads, order = held.k.shape[1], position_order(held)
        mass = group_mean(mass_received(memory.row, held), kv_heads)
        # All heads hold the same tokens, but for their order.
        shared = to_kv_heads(jnp.mean(ordered(mass, order), axis=1), kv_heads)
        return protect_last(unsorted(shared, order), held, 1)


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

    needs_mass: ClassVar[bool] = True
    per_head: ClassVar[bool] = True
    normalize: bool = True
    recent: Count = sized(0, short=8, recent=True)

    @property
    def protected(self):
        return self.recent

    def tokens(self, asked):
        return jnp.zeros(asked.k.shape[:3], jnp.float32)

    def received(self, slots, mass):
        return slots + group_mean(mass, slots.shape[1])

    def score(self, memory, held, counts):
        del counts
        return protect_last(self._received(memory, held), held, self.recent)

    def unprotected(self, memory, held, scores):
        del scores
        return self._received(memory, held)

    def _received(self, memory: Memory, held: Held) -> Scores:
        if not self.normalize:
            return memory.slots
        seen_by = jnp.maximum(held.seen[:, None, None] - held.positions, 1)
        return memory.slots / seen_by.astype(jnp.float32)
