"""CaM: dropped values go into the kept tokens that follow (openreview LCTmppB165)."""

import dataclasses
from typing import final

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kvjax.cache import AbstractMerge
from kvjax.config import sized
from kvjax.fields import Size
from kvjax.scorers.base import ordered, position_order, unsorted


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class CaM(AbstractMerge):
    """A part of each dropped value is added to those of the next kept tokens.

        v_j += clip(A_i / mean_j A_j, 0, 1) v_i / m    for the m kept tokens j after i

    `A` is what ranks the tokens, unprotected. It is meant to be attention received:
    what has none (`A_i <= 0`) gives nothing. Keys stay as they are, and so does what
    follows no dropped token.

    Attributes:
        receivers: kept tokens `m`, by position, that share a dropped value; near the
            end of a row as many as there are, and behind its last one none.

    Cost: `O(S D m)` per KV head and eviction; temporaries linear in `S D`. No state.

    Source: CaM (openreview LCTmppB165) section 4; kvpress `CAMPress` (32 receivers).
    Deviations: the expectation of what both draw, 0 or 1 with the probability
    `clip(..)`, so that a cache is a function of its prompt; per KV head; all dropped
    tokens merge (kvpress: as many as there were steps).
    """

    receivers: Size = sized(32, short=8)

    def merged(self, held, kept, scores):
        # Receivers of a token are a run among the kept tokens in order: those of rank
        # `first .. first + m - 1`.
        order = position_order(held)
        scores = jnp.where(held.live, scores, 0.0)
        count = jnp.cumsum(ordered(kept, order), axis=-1, dtype=jnp.int32)
        first = unsorted(count, order)
        total = jnp.max(count, axis=-1, keepdims=True)
        number = jnp.clip(total - first, 0, self.receivers)
        dropped = held.live & ~kept & (number > 0) & (scores > 0)
        known = _at_ranks(jnp.where(kept, scores, 0.0), first - 1, kept)
        at = jnp.minimum(first, known.shape[-1] - 1)
        around = jnp.take_along_axis(self._sums(known, ahead=True), at, axis=-1)
        share = jnp.where(dropped, _share(scores, around, number), 0.0)

        given = share[..., None] * held.v.astype(jnp.float32)
        given = self._sums(_at_ranks(given, first, dropped))
        some = self._sums(_at_ranks(jnp.ones_like(share), first, dropped)) > 0
        rank = jnp.maximum(first - 1, 0)
        more = jnp.take_along_axis(given, rank[..., None], axis=2)
        some = kept & jnp.take_along_axis(some, rank, axis=-1)
        summed = (held.v.astype(jnp.float32) + more).astype(held.v.dtype)
        return held.k, jnp.where(some[..., None], summed, held.v)

    def _sums(self, x: Array, ahead: bool = False) -> Array:
        """Sums over `receivers` ranks, `[B, K, S, ...]`: up to each, or from it on."""
        window, pad = [1] * x.ndim, [(0, 0)] * x.ndim
        window[2] = min(self.receivers, x.shape[2])
        pad[2] = (0, window[2] - 1) if ahead else (window[2] - 1, 0)
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1,) * x.ndim, pad)


def _share(scores: Array, around: Array, number: Array) -> Array:
    """Part of a dropped value that each of its `number` receivers gets."""
    number = jnp.maximum(number, 1).astype(jnp.float32)
    some = around > 0
    mean = jnp.where(some, around / number, 1.0)
    return jnp.where(some, jnp.clip(scores / mean, 0.0, 1.0), 1.0) / number


def _at_ranks(x: Array, rank: Array, on: Array) -> Array:
    """What tokens have, `[B, K, S, ...]`, added up at their ranks where `on`."""
    b, heads, s = rank.shape
    row, head = jnp.arange(b)[:, None, None], jnp.arange(heads)[:, None]
    rank = jnp.where(on, rank, s)
    return jnp.zeros_like(x).at[row, head, rank].add(x, mode="drop")
