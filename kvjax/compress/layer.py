"""The cache of one layer, built from what the pass over the prompt left."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kvjax.cache import Growth, KeysOnly, LayerCache, Pages, Ragged, Slots, Tracking
from kvjax.cache.parts import AbstractPart
from kvjax.cache.tail import Tail, empty_tail
from kvjax.codecs import AbstractCodec, AbstractEncoded, PlainArray, straight_through
from kvjax.compress.config import Compression, Eviction
from kvjax.compress.observe import Observed, tracker_of
from kvjax.compress.select import Choice, choose, choose_flat, take, take_flat
from kvjax.compress.survey import Layout, Share
from kvjax.pallas_kernels.page_summary import page_summary
from kvjax.reads import Quest
from kvjax.schedules import EveryTokens
from kvjax.types import EMPTY, LayerSpec, Lengths, Scores


def build(
    observed: Observed,
    lengths: Lengths,
    c: Compression,
    layout: Layout,
    share: Share,
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
        layout: of this layer.
        share: what this layer gets.
        room: later tokens that must fit.
        priorities: an earlier layer's, where its kept tokens are reused.
        differentiable: hold decoded arrays with straight-through gradients instead of
            codes (the parallel form).

    Returns:
        The cache, and the priorities that chose it.
    """
    builder = _Builder(observed, lengths, c, layout, share, room, differentiable)
    evict = layout.evict
    if evict is None:
        return builder.uniform(builder.everything(), lengths), None
    priorities = builder.chosen(evict, priorities)
    if evict.budget.per_head:
        return builder.ragged(priorities), priorities
    if c.evict is not None and isinstance(c.schedule, EveryTokens):
        return builder.bounded(evict, priorities), priorities
    if evict.values is not None:
        return builder.decoupled(priorities), priorities
    choice = choose(priorities, share.held, layout.slots)
    return builder.uniform(choice, share.held), priorities


def handed_on(c: Compression, batch: int, spec: LayerSpec, tokens: int):
    """What the first layer is handed where layers reuse the choice of others."""
    if c.evict is None or c.evict.unit.reuse == 1:
        return None
    return jnp.zeros((batch, spec.num_kv_heads, tokens), jnp.float32)


class _Builder:
    """The steps of `build`, with what they share."""

    def __init__(self, observed, lengths, c, layout, share, room, differentiable):
        self.k, self.v, self.spec = observed.k, observed.v, observed.spec
        self.observed, self.lengths, self.c = observed, lengths, c
        self.layout, self.share = layout, share
        self.room, self.differentiable = room, differentiable
        self.batch, self.kv_heads, self.tokens, self.head_dim = self.k.shape

    def chosen(self, evict: Eviction, before: Scores | None) -> Scores:
        """Priorities of the layer's own, or those of an earlier one."""
        own = functools.partial(self.priorities, evict)
        if self.share.leads is None or before is None:
            return own()
        return jax.lax.cond(self.share.leads, own, lambda: before)

    def priorities(self, evict: Eviction) -> Scores:
        """Priorities of all prompt tokens; padding and dead tokens are `-inf`."""
        counts = self.share.counts
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

    def uniform(self, choice: Choice, counts: Array) -> LayerCache:
        """The same capacity for all heads, with or without blocks of later tokens."""
        block, slots, page = self.layout.block, self.layout.slots, self.layout.page
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

    def ragged(self, priorities: Scores) -> LayerCache:
        """One flat buffer whose heads share the layer's slots."""
        store, share = self.c.store, self.share
        multiple = math.lcm(store.keys.append_multiple, store.values.append_multiple)
        capacity = -(-self.layout.slots // multiple) * multiple
        assert share.sure is not None and share.total is not None
        flat = choose_flat(priorities, share.sure, share.total, capacity)
        positions = jnp.where(flat.live, flat.index, EMPTY)
        part = Ragged(
            keys=self.keys(take_flat(self.k, flat), flat.live, positions),
            values=self.values(take_flat(self.v, flat), flat.live, positions),
            positions=positions,
            offsets=flat.offsets,
        )
        return self.layer((part,), self.tail(self.room))

    def bounded(self, evict: Eviction, priorities: Scores) -> LayerCache:
        """A body that decode-time eviction keeps within its slots."""
        tracker, slots = tracker_of(self.c), self.layout.slots
        assert tracker is not None
        limit = self.share.counts
        if evict.budget.keep is None:  # a short prompt's body grows up to its bound
            limit = jnp.full_like(limit, slots)
        choice = _fit(choose(priorities, self.share.counts, slots), slots)
        state = tracker.start(self.observed.seed, choice.index, tracker.interval)
        return self.layer(
            (self.part(choice, slots),),
            self.tail(tracker.interval),
            tracking=Tracking(state=state, limit=limit),
            tracker=tracker,
        )

    def decoupled(self, priorities: Scores) -> LayerCache:
        """Tokens with key and value, and tokens whose key alone is kept."""
        n_both, n_keys = self.share.full, self.share.counts
        full = choose(priorities, n_both, self.layout.full)
        order = jnp.argsort(-priorities, axis=-1, stable=True)
        rank = jnp.argsort(order, axis=-1)
        second = jnp.where(rank < n_both[:, None, None], -jnp.inf, priorities)
        capacity = self.layout.bare
        part = self.part(full, self.layout.full)
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
