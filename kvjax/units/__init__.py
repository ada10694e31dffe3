"""What is kept or dropped as one? Units turn token scores into an order of tokens."""

import abc
import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax import exact
from kvjax.budgets import AbstractBudget
from kvjax.cache import levelled
from kvjax.fields import Checked, OneOf, Positive, Size
from kvjax.types import LayerSpec, Lengths, Scores

SCAN = 256
"""Lengths that are looked through one by one, where slots rise and fall with them."""

MANY = 64
"""Ranges of lengths that are looked into before a bound has to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractUnit(Checked, abc.ABC):
    """Turns scores into priorities: the tokens with the highest ones are kept.

    Attributes:
        reuse: layers that share one set of kept tokens: the first of every `reuse`
            layers chooses for all of them.
    """

    reuse: Positive = 1

    single: ClassVar[bool] = False
    """Whether tokens are kept or dropped one by one."""

    @abc.abstractmethod
    def priorities(
        self,
        scores: Scores,
        lengths: Lengths,
        counts: Int[Array, "B"],
        protected: int = 0,
    ) -> Scores:
        """Priorities; `+inf` is kept first, `-inf` never.

        Args:
            scores: token scores; `+inf` protects, `-inf` forbids (and is padding).
            lengths: live tokens per row.
            counts: tokens per head that the budget allows.
            protected: tokens that the score keeps in any case.
        """

    def slots(
        self,
        counts: Int[Array | np.ndarray, "... B"],
        lengths: Int[Array | np.ndarray, "B"],
        protected: int = 0,
    ) -> Any:
        """Slots that budgets of `counts` tokens need, for rows of `lengths`.

        Args:
            counts: tokens per head that the budget allows, NumPy or traced.
            lengths: row lengths.
            protected: tokens that the score keeps in any case.
        """
        del lengths, protected
        return counts

    def capacities(
        self,
        budget: AbstractBudget,
        longest: int,
        specs: tuple[LayerSpec, ...],
        slot_bytes: float,
        protected: int = 0,
    ) -> tuple[int, ...]:
        """Slots per head of every layer that do for all rows of `0 .. longest` tokens.

        Args:
            budget: says how many tokens are kept.
            longest: largest row length.
            specs: all layers.
            slot_bytes: bytes of one slot of one head, for budgets in bytes.
            protected: tokens that the score keeps in any case.
        """
        del protected
        return budget.capacities(longest, specs, slot_bytes)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Token(AbstractUnit):
    """Every token by itself."""

    single: ClassVar[bool] = True

    def priorities(self, scores, lengths, counts, protected=0):
        del lengths, counts, protected
        return scores


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk(AbstractUnit):
    """Runs of consecutive tokens.

    Attributes:
        size: tokens per chunk; the last one of a row may be shorter.
        reduce: chunk score, `sum` or `mean` of its tokens' scores.
        share_heads: sum scores over KV heads, so that all heads keep the same chunks.
        whole: keep whole chunks only, `max(1, floor(chunks * keep))` of them, and
            treat a chunk with a protected token as protected, the newest first where
            they do not all fit: then only the protected tokens of the others stay.
            Otherwise the budget is met exactly: protected tokens first, then chunks
            by score, the last one trimmed.

    Priorities are ranks; their gradient is that of the scores of the chunks, in units
    of spread, so that the choice can be learned (`kvjax.compress.relaxed`).

    Source: ChunkKV (2502.00299) algorithm 1 (`sum`, size 10, trimmed, reuse 2);
    kvpress `ChunkKVPress` (`mean`, size 20, shared heads, whole).
    """

    size: Size = 10
    reduce: Annotated[str, OneOf("sum", "mean")] = "sum"
    share_heads: bool = False
    whole: bool = False

    def priorities(self, scores, lengths, counts, protected=0):
        s = scores.shape[-1]
        sure, forbidden = jnp.isposinf(scores), jnp.isneginf(scores)
        total, held = self._chunk_scores(scores, lengths)
        rank = self._chunk_ranks(total, held, lengths)
        chunk = jnp.arange(s) // self.size
        order = jnp.take(rank, chunk, axis=-1) * self.size + jnp.arange(s) % self.size
        priority = -order.astype(jnp.float32)
        slope = (total - jax.lax.stop_gradient(total)) * _steepness(total, priority)
        priority = priority + jnp.take(slope, chunk, axis=-1)
        if self.whole:
            kept = self._kept(counts, lengths)
            out = jnp.take(rank, chunk, axis=-1) >= kept[:, None, None]
            priority = jnp.where(out, -jnp.inf, priority)
            if self.share_heads:
                sure = jnp.broadcast_to(sure.any(1, keepdims=True), sure.shape)
            newer = jnp.flip(jnp.cumsum(jnp.flip(sure, -1), axis=-1), -1)
            limit = self.slots(counts, lengths, protected)
            sure = sure & (newer <= limit[:, None, None])
        priority = jnp.where(sure, jnp.inf, priority)
        return jnp.where(forbidden, -jnp.inf, priority)

    def _chunk_scores(
        self, scores: Scores, lengths: Lengths
    ) -> tuple[Float[Array, "B K C"], Bool[Array, "B K C"]]:
        """Finite scores of the chunks, and which hold a protected token."""
        b, k, s = scores.shape
        finite = jnp.where(jnp.isfinite(scores), scores, 0.0)
        pad = [(0, 0), (0, 0), (0, -s % self.size)]
        total = jnp.pad(finite, pad).reshape(b, k, -1, self.size).sum(-1)
        held = jnp.pad(jnp.isposinf(scores), pad).reshape(b, k, -1, self.size).any(-1)
        if self.share_heads:
            total = jnp.broadcast_to(total.sum(1, keepdims=True), total.shape)
            held = jnp.broadcast_to(held.any(1, keepdims=True), held.shape)
        if self.reduce == "mean":
            start = jnp.arange(total.shape[-1]) * self.size
            live = jnp.clip(lengths[:, None, None] - start, 1, self.size)
            total = total / live.astype(total.dtype)
        return total, held

    def _chunk_ranks(self, total: Array, held: Array, lengths: Lengths) -> Array:
        """0 for the best chunk of each head.

        Ties go to the earlier chunk, among whole chunks that are protected to the
        later one.
        """
        chunk = jnp.arange(total.shape[-1], dtype=jnp.int32)
        total, later = levelled(jax.lax.stop_gradient(total)), chunk
        if self.whole:
            total = jnp.where(held, jnp.inf, total)
            later = jnp.where(held, -chunk, chunk)
        there = chunk * self.size < lengths[:, None, None]
        total = jnp.where(there, total, -jnp.inf)
        later = jnp.broadcast_to(later, total.shape)
        order = jnp.lexsort((later, -total), axis=-1)
        return jnp.argsort(order, axis=-1)

    def slots(self, counts, lengths, protected=0):
        if not self.whole:
            return counts
        xp = exact.namespace(counts, lengths)
        whole = self._kept(counts, lengths) * self.size
        # Chunks are rounded down, and may hold less than what is always kept.
        whole = xp.maximum(whole, xp.minimum(counts, min(protected, exact.LONGEST)))
        return xp.minimum(whole, lengths)

    def _kept(self, counts: Any, lengths: Any) -> Any:
        """Whole chunks, `floor(chunks * counts / lengths)` of them, at least 1.

        As `floor((counts + floor(counts * pad / lengths)) / size)`, `pad` being what
        the last chunk lacks: `chunks * counts` may not fit in 32 bits.
        """
        xp = exact.namespace(counts, lengths)
        pad = -lengths % self.size
        rows = xp.maximum(lengths, 1)
        more = exact.floor_product(counts, pad, rows, self.size - 1)
        return xp.maximum((counts + more) // self.size, 1)

    def capacities(self, budget, longest, specs, slot_bytes, protected=0):
        """See `AbstractUnit.capacities`.

        Whole chunks rise and fall with the length. A row of `a .. b` tokens needs at
        most `b` slots, and at most `c + (size - 1) c / a` rounded down to chunks, `c`
        being the budget's capacity for rows up to `b`. Ranges of lengths that may need
        more than what was found are halved, and short ones looked through. That finds
        the largest number, unless it takes many steps: then the bound is returned.
        """
        if not self.whole:
            return budget.capacities(longest, specs, slot_bytes)

        def needed(lengths: np.ndarray) -> Any:
            counts = budget.counts(lengths, specs, slot_bytes)
            slots = self.slots(counts, lengths, protected)
            return slots.max(axis=1)

        turns = budget.turns(longest, specs, slot_bytes)
        near = turns[:, None] + np.arange(-SCAN // 2, SCAN // 2)
        found = needed(np.unique(np.clip(near, 0, longest)))
        ranges, steps = [(0, longest)], 0
        while ranges:
            start, end = ranges.pop()
            most = np.array(budget.capacities(end, specs, slot_bytes))
            pads = (self.size - 1) * most // max(start, 1)
            most = most + np.minimum(pads, self.size - 1)
            most = np.maximum(most // self.size, 1) * self.size
            most = np.maximum(most, protected)
            most = np.minimum(most, end)
            if (most <= found).all():
                continue
            steps += 1
            if end - start < SCAN:
                found = np.maximum(found, needed(np.arange(start, end + 1)))
            elif steps > MANY:
                found = np.maximum(found, most)
            else:
                middle = (start + end) // 2
                ranges += [(start, middle), (middle + 1, end)]
        return tuple(int(slots) for slots in found)


def _steepness(total: Array, priority: Array) -> Array:
    """Spread of the priorities of a head over that of its chunks' scores."""
    spreads = [jnp.std(x, axis=-1, keepdims=True) for x in (priority, total)]
    return jax.lax.stop_gradient(spreads[0] / jnp.maximum(spreads[1], 1e-6))


UNITS: Mapping[str, type[AbstractUnit]] = MappingProxyType(
    {"token": Token, "chunk": Chunk}
)
