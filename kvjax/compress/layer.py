"""The cache of one layer, built from what the pass over the prompt left."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kvjax.cache import Growth, KeysOnly, LayerCache, Pages, Ragged, Slots, Tracking
from kvjax.cache.parts import AbstractPart
from kvjax.cache.tail import Tail, empty_tail
from kvjax.codecs import AbstractCodec, AbstractEncoded, PlainArray, straight_through
from kvjax.compress.config import Compression, Eviction
from kvjax.compress.observe import Observed, eviction_of, tracker_of
from kvjax.compress.select import Choice, choose, choose_flat, take, take_flat
from kvjax.pallas_kernels.page_summary import page_summary
from kvjax.reads import Quest
from kvjax.schedules import EveryTokens
from kvjax.types import EMPTY, Lengths, Scores


def build(
    observed: Observed,
    lengths: Lengths,
    c: Compression,
    *,
    room: int,
    priorities: Scores | None = None,
    differentiable: bool = False,
) -> tuple[LayerCache, Scores | None]:
    """The layer's cache after the prompt.

    Args:
        observed: see `observe`.
        lengths: tokens of each prompt.
        c: what is done.
        room: later tokens that must fit.
        priorities: an earlier layer's, where its kept tokens are reused.
        differentiable: hold decoded arrays with straight-through gradients instead of
            codes (the parallel form).

    Returns:
        The cache, and the priorities that chose it.
    """
    builder = _Builder(observed, lengths, c, room, differentiable)
    evict = eviction_of(c, observed.spec, builder.tokens)
    if evict is None:
        return builder.uniform(builder.everything(), lengths, builder.tokens), None
    counts, held, slots = builder.counts(evict)
    shared = observed.spec.index % evict.unit.reuse != 0
    if priorities is None or not shared:
        priorities = builder.priorities(evict, counts)
    if evict.budget.per_head:
        return builder.ragged(evict, priorities), priorities
    if c.evict is not None and isinstance(c.schedule, EveryTokens):
        return builder.bounded(evict, priorities, counts, slots), priorities
    if evict.values is not None:
        return builder.decoupled(evict, priorities, counts), priorities
    choice = choose(priorities, held, slots)
    return builder.uniform(choice, held, slots), priorities


class _Builder:
    """The steps of `build`, with what they share."""

    def __init__(self, observed, lengths, c, room, differentiable):
        self.k, self.v, self.spec = observed.k, observed.v, observed.spec
        self.observed, self.lengths, self.c = observed, lengths, c
        self.room, self.differentiable = room, differentiable
        self.batch, self.kv_heads, self.tokens, self.head_dim = self.k.shape

    def slot_bytes(self) -> float:
        """Bytes of one slot of one head, its position included."""
        size = self.k.dtype.itemsize
        store = self.c.store
        return 4 + sum(
            codec.slot_bytes(self.head_dim, size)
            for codec in (store.keys, store.values)
        )

    def counts(self, evict: Eviction) -> tuple[Int[Array, "B"], Int[Array, "B"], int]:
        """Tokens per head that the budget gives each row; slots that these may need.

        Whole chunks may hold a few more tokens than the budget, or fewer. Last: the
        slots of the longest row.
        """
        table, slots = self.tables(evict)
        counts, held = (jnp.take(jnp.asarray(x), self.lengths) for x in (table, slots))
        return counts, held, int(slots.max())

    def tables(self, evict: Eviction) -> tuple[np.ndarray, np.ndarray]:
        """Both of `counts`, for rows of `0 .. T` tokens."""
        table = evict.budget.table(self.tokens, self.spec, self.slot_bytes())
        slots = evict.unit.slots(table, np.arange(self.tokens + 1))
        return table, slots.astype(np.int32)

    def priorities(self, evict: Eviction, counts: Int[Array, "B"]) -> Scores:
        """Priorities of all prompt tokens; padding and dead tokens are `-inf`."""
        scores = evict.score.rank(self.observed.seen, counts, self.lengths)
        index = jnp.arange(self.tokens)
        length = self.lengths[:, None, None]
        usable = index < length
        if self.spec.window is not None:
            usable = usable & (index > length - 1 - self.spec.window)
        scores = jnp.where(usable, scores.astype(jnp.float32), -jnp.inf)
        return evict.unit.priorities(scores, self.lengths, counts)

    def everything(self) -> Choice:
        """All tokens of the prompt, in order."""
        index = jnp.arange(self.tokens, dtype=jnp.int32)
        shape = (self.batch, self.kv_heads, self.tokens)
        live = index < self.lengths[:, None, None]
        return Choice(jnp.broadcast_to(index, shape), jnp.broadcast_to(live, shape))

    def keys(self, k, live, positions) -> AbstractEncoded:
        """Keys as they are held."""
        codec, basis = self.c.store.keys, self.observed.key_basis
        return self.encode(k, live, positions, codec, basis)

    def values(self, v, live, positions) -> AbstractEncoded:
        """Values as they are held."""
        codec, basis = self.c.store.values, self.observed.value_basis
        return self.encode(v, live, positions, codec, basis)

    def encode(
        self, x, live, positions, codec: AbstractCodec, basis: Array | None
    ) -> AbstractEncoded:
        """Codes, or in the parallel form what they decode to."""
        x = jnp.where(live[..., None], x, 0)
        encoded = codec.encode(x, live, positions, self.spec.rope, basis)
        if not self.differentiable or isinstance(encoded, PlainArray):
            return encoded
        decoded = encoded.decode(positions, self.spec.rope)
        if codec.differentiable:
            return PlainArray(data=jnp.where(live[..., None], decoded, 0))
        return PlainArray(data=straight_through(x, decoded))

    def part(self, choice: Choice, slots: int, filled=None) -> Slots:
        """Chosen tokens in `slots` slots, padded to what the codecs group."""
        store = self.c.store
        multiple = math.lcm(store.keys.append_multiple, store.values.append_multiple)
        choice = _fit(choice, -(-slots // multiple) * multiple)
        positions = jnp.where(choice.live, choice.index, EMPTY)
        return Slots(
            keys=self.keys(take(self.k, choice), choice.live, positions),
            values=self.values(take(self.v, choice), choice.live, positions),
            positions=positions,
            filled=filled,
        )

    def layer(
        self, parts: tuple[AbstractPart, ...], tail: Tail, **fields
    ) -> LayerCache:
        return LayerCache(parts=parts, tail=tail, spec=self.spec, **fields)

    def tail(self, capacity: int) -> Tail:
        return empty_tail(
            self.batch, self.kv_heads, capacity, self.head_dim, self.k.dtype
        )

    def uniform(self, choice: Choice, counts: Array, slots: int) -> LayerCache:
        """The same capacity for all heads, with or without blocks of later tokens."""
        block = self.c.block(self.spec)
        if not block:
            return self.layer((self.part(choice, slots),), self.tail(self.room))
        whole = counts // block * block  # tokens that are encoded now
        capacity = max(1, (slots + self.room) // block) * block
        index = jnp.arange(max(capacity, slots))
        body = _fit(choice, index.shape[0])
        body = Choice(body.index, body.live & (index < whole[:, None, None]))
        part = self.part(_fit(body, capacity), capacity, filled=whole)
        tail = self.rest(choice, whole, counts, block)
        growth = Growth(block=block, keys=self.c.store.keys, values=self.c.store.values)
        page = self.c.read.page_of(self.spec)
        body_part = part if page is None else self.paged(part, page)
        return self.layer((body_part,), tail, growth=growth)

    def rest(self, choice: Choice, whole: Array, counts: Array, block: int) -> Tail:
        """The chosen tokens behind the last whole block, plain."""
        wide = _fit(choice, choice.index.shape[-1] + block)
        at = whole[:, None, None] + jnp.arange(block)
        at = jnp.broadcast_to(at, (self.batch, self.kv_heads, block))
        index = jnp.take_along_axis(wide.index, at, axis=-1)
        live = jnp.take_along_axis(wide.live, at, axis=-1)
        picked = Choice(index, live)
        return Tail(
            keys=take(self.k, picked),
            values=take(self.v, picked),
            positions=jnp.where(live, index, EMPTY),
            used=(counts - whole).astype(jnp.int32),
        )

    def paged(self, part: Slots, page: int) -> Pages:
        """The same slots with key bounds, to be read page by page."""
        read = self.c.read
        assert isinstance(read, Quest) and part.filled is not None
        keys = part.keys.decode(part.positions, self.spec.rope)
        low, high, _ = page_summary(keys, part.positions >= 0, page=page)
        return Pages(
            keys=part.keys,
            values=part.values,
            positions=part.positions,
            low=low,
            high=high,
            budget=read.budget,
            filled=part.filled,
            page=page,
            most=read.most_pages(part.positions.shape[-1] // page),
        )

    def ragged(self, evict: Eviction, priorities: Scores) -> LayerCache:
        """One flat buffer whose heads share the layer's slots."""
        store = self.c.store
        _, slots = self.tables(evict)
        each, all_heads = evict.budget.shares(
            slots, np.arange(self.tokens + 1), self.spec
        )
        sure = jnp.take(jnp.asarray(each), self.lengths, axis=0)
        counts = jnp.take(jnp.asarray(all_heads), self.lengths)
        multiple = math.lcm(store.keys.append_multiple, store.values.append_multiple)
        capacity = -(-int(all_heads.max()) // multiple) * multiple
        flat = choose_flat(priorities, sure, counts, capacity)
        positions = jnp.where(flat.live, flat.index, EMPTY)
        part = Ragged(
            keys=self.keys(take_flat(self.k, flat), flat.live, positions),
            values=self.values(take_flat(self.v, flat), flat.live, positions),
            positions=positions,
            offsets=flat.offsets,
        )
        return self.layer((part,), self.tail(self.room))

    def bounded(self, evict, priorities, counts, slots) -> LayerCache:
        """A body that decode-time eviction keeps within its slots."""
        tracker = tracker_of(self.c)
        assert tracker is not None
        limit, bound = counts, evict.budget.bound(self.spec, self.slot_bytes())
        if bound is not None:  # a short prompt's body grows up to it
            slots, limit = bound, jnp.full_like(counts, bound)
        choice = _fit(choose(priorities, counts, slots), slots)
        state = tracker.start(self.observed.seed, choice.index, tracker.interval)
        return self.layer(
            (self.part(choice, slots),),
            self.tail(tracker.interval),
            tracking=Tracking(state=state, limit=limit),
            tracker=tracker,
        )

    def decoupled(self, evict, priorities, counts) -> LayerCache:
        """Tokens with key and value, and tokens whose key alone is kept."""
        both = evict.values.table(self.tokens, self.spec, self.slot_bytes())
        keys = np.maximum(
            evict.budget.table(self.tokens, self.spec, self.slot_bytes()), both
        )
        n_both = jnp.take(jnp.asarray(both), self.lengths)
        n_keys = jnp.take(jnp.asarray(keys), self.lengths)
        full = choose(priorities, n_both, int(both.max()))
        order = jnp.argsort(-priorities, axis=-1, stable=True)
        rank = jnp.argsort(order, axis=-1)
        second = jnp.where(rank < n_both[:, None, None], -jnp.inf, priorities)
        capacity = int((keys - both).max())
        part = self.part(full, int(both.max()))
        if capacity == 0:
            return self.layer((part,), self.tail(self.room))
        return self.layer(
            (part, self.keys_only(choose(second, n_keys - n_both, capacity), capacity)),
            self.tail(self.room),
        )

    def keys_only(self, choice: Choice, capacity: int) -> KeysOnly:
        multiple = self.c.store.keys.append_multiple
        choice = _fit(choice, -(-capacity // multiple) * multiple)
        positions = jnp.where(choice.live, choice.index, EMPTY)
        values = take(self.v, choice).astype(jnp.float32)
        held = jnp.maximum(jnp.sum(choice.live, axis=-1), 1)
        mean = jnp.sum(values, axis=2) / held[..., None].astype(jnp.float32)
        keys = take(self.k, choice)
        return KeysOnly(
            keys=self.keys(keys, choice.live, positions),
            rest=mean.astype(self.v.dtype),
            positions=positions,
        )


def _fit(choice: Choice, slots: int) -> Choice:
    """Padded with free slots, or cut, to `slots`."""
    short = slots - choice.index.shape[-1]
    if short <= 0:
        return Choice(choice.index[..., :slots], choice.live[..., :slots])
    pad = [(0, 0), (0, 0), (0, short)]
    return Choice(jnp.pad(choice.index, pad), jnp.pad(choice.live, pad))
