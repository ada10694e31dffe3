"""The cache of one layer, built from what the pass over the prompt left."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kvjax.cache import (
    AbstractPart,
    Folding,
    Growth,
    KeysOnly,
    LayerCache,
    Ragged,
    Slots,
    Tail,
    Tracking,
    empty_tail,
    folded,
    placed,
    slot_ways,
)
from kvjax.codecs import AbstractCodec, AbstractEncoded, PlainArray
from kvjax.compress import shards
from kvjax.compress.config import Compression
from kvjax.compress.eviction import Eviction
from kvjax.compress.observe import Observed
from kvjax.compress.plan import Storage
from kvjax.compress.priorities import held_of, own_or_handed
from kvjax.compress.select import (
    Choice,
    FlatChoice,
    choose,
    choose_flat,
    chosen_mask,
    head_counts,
    ranks,
    take,
    take_flat,
)
from kvjax.compress.stored import merged, stored
from kvjax.compress.survey import Layout, Share
from kvjax.types import EMPTY, Held, LayerSpec, Lengths, Scores


def build(
    observed: Observed,
    lengths: Lengths,
    layout: Layout,
    share: Share,
    *,
    room: int,
    layer: Int[Array, ""] | int = 0,
    before: Int[Array, ""] | int = 0,
    priorities: Scores | None = None,
    differentiable: bool = False,
) -> tuple[LayerCache, Scores | None]:
    """The layer's cache after the prompt.

    Args:
        observed: see `observe`.
        lengths: tokens of each prompt.
        layout: of this layer.
        share: what this layer gets.
        room: later tokens that must fit.
        layer: its number.
        before: tokens of a prefix, which the cache does not hold.
        priorities: an earlier layer's, where its kept tokens are reused.
        differentiable: hold decoded arrays with straight-through gradients instead of
            codes (the parallel form).

    Returns:
        The cache, and the priorities that chose it.
    """
    held = held_of(observed, lengths, layer, before)
    builder = _Builder(
        observed=observed,
        held=held,
        lengths=lengths,
        layout=layout,
        share=share,
        room=room,
        differentiable=differentiable,
    )
    plan = layout.plan
    if plan.evict is None:
        return builder.uniform(builder.everything(), lengths), None
    how = (observed, held, lengths, plan.evict, share)
    priorities = own_or_handed(*how, priorities)
    if layout.shared:
        return builder.ragged(plan.evict, priorities), priorities
    if (interval := plan.schedule.interval) is not None:
        return builder.bounded(plan.evict, priorities, interval), priorities
    if plan.evict.values is not None:
        return builder.decoupled(priorities), priorities
    choice = choose(priorities, share.held, layout.slots)
    return builder.merged(choice).uniform(choice, share.held), priorities


def handed_on(c: Compression, batch: int, spec: LayerSpec, tokens: int):
    """What the first layer is handed where layers reuse the choice of others."""
    if all(part.evict is None or part.evict.unit.reuse == 1 for part in c.parts):
        return None
    return jnp.zeros((batch, spec.num_kv_heads, tokens), jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Builder:
    """The steps of `build`, with what they share."""

    observed: Observed
    held: Held
    lengths: Lengths
    layout: Layout
    share: Share
    room: int
    differentiable: bool

    @property
    def store(self) -> Storage:
        return self.layout.plan.store

    @property
    def spec(self) -> LayerSpec:
        return self.held.spec

    def merged(self, choice: Choice | FlatChoice) -> Self:
        """The same, with what is dropped put into what is chosen, if that is asked."""
        evict, memory = self.layout.plan.evict, self.observed.memory
        if evict is None or evict.merge is None:
            return self
        assert memory is not None
        kept = chosen_mask(choice, self.held.live)
        k, v = merged(evict, memory, self.held, kept, self.share.counts)
        return dataclasses.replace(self, held=dataclasses.replace(self.held, k=k, v=v))

    def everything(self) -> Choice:
        """All tokens of the prompt, in order."""
        index = jnp.arange(self.held.k.shape[2], dtype=jnp.int32)
        return Choice(jnp.broadcast_to(index, self.held.live.shape), self.held.live)

    def positions(self, choice: Choice) -> Int[Array, "B K C"]:
        """Of the chosen tokens; `EMPTY` in free slots."""
        at = jnp.take_along_axis(self.held.positions, choice.index, axis=-1)
        return jnp.where(choice.live, at, EMPTY)

    def keys(self, k, live, positions) -> AbstractEncoded:
        """Keys as they are held."""
        return self.encode(k, live, positions, self.store.keys, self.observed.sides[0])

    def values(self, v, live, positions) -> AbstractEncoded:
        """Values as they are held."""
        side = self.observed.sides[1]
        return self.encode(v, live, positions, self.store.values, side)

    def encode(
        self, x, live, positions, codec: AbstractCodec, side: Any
    ) -> AbstractEncoded:
        """See `stored`."""
        how = (codec, x, live, positions, self.spec, side)
        return stored(*how, differentiable=self.differentiable)

    def part(self, choice: Choice, slots: int, filled=None) -> Slots:
        """Chosen tokens in `slots` slots, padded to what the codecs group.

        On a mesh that splits them every device has as many.
        """
        multiple = self.store.multiple * slot_ways(*self.held.k.shape[:2])
        choice = _fit(choice, -(-slots // multiple) * multiple)
        positions = self.positions(choice)
        return Slots(
            keys=self.keys(take(self.held.k, choice), choice.live, positions),
            values=self.values(take(self.held.v, choice), choice.live, positions),
            positions=positions,
            filled=filled,
        )

    def layer(
        self, parts: tuple[AbstractPart, ...], tail: Tail, **fields
    ) -> LayerCache:
        # What is poured into a buffer for several layers is moved with it.
        if not (self.differentiable or self.layout.pooled):
            parts = tuple(placed(part, self.store.place.body) for part in parts)
        return LayerCache(parts=parts, tail=tail, spec=self.spec, **fields)

    def tail(self, capacity: int) -> Tail:
        b, kv_heads, _, head_dim = self.held.k.shape
        return empty_tail(b, kv_heads, capacity, head_dim, self.held.k.dtype)

    def uniform(self, choice: Choice, counts: Array) -> LayerCache:
        """The same capacity for all heads, with or without blocks of later tokens."""
        plan, slots = self.layout.plan, self.layout.slots
        block = plan.block
        if not block:
            page = plan.read.page
            parts = self.indexed(choice, -(-slots // page) * page)
            return self.layer(parts, self.tail(self.room))
        whole = counts // block * block  # tokens that are encoded now
        ways = slot_ways(*self.held.k.shape[:2])
        capacity = -(-max(1, (slots + self.room) // block) // ways) * ways * block
        index = jnp.arange(max(capacity, slots))
        body = _fit(choice, index.shape[0])
        body = Choice(body.index, body.live & (index < whole[:, None, None]))
        parts = self.indexed(_fit(body, capacity), capacity, filled=whole)
        tail = self.rest(choice, whole, counts, block)
        growth = Growth(block=block, keys=self.store.keys, values=self.store.values)
        return self.layer(parts, tail, growth=growth)

    def indexed(
        self, choice: Choice, slots: int, filled: Array | None = None
    ) -> tuple[AbstractPart, ...]:
        """Chosen tokens in parts that know what a query reads of them."""
        part, read = self.part(choice, slots, filled), self.layout.plan.read
        choice = _fit(choice, part.positions.shape[-1])
        exact = Slots(
            keys=PlainArray(data=take(self.held.k, choice)),
            values=PlainArray(data=take(self.held.v, choice)),
            positions=part.positions,
            filled=filled,
        )
        seen = jax.tree.map(lambda x: _moved(x, choice), self.observed.index)
        return read.index(part, exact, seen, self.spec)

    def rest(self, choice: Choice, whole: Array, counts: Array, block: int) -> Tail:
        """The chosen tokens behind the last whole block, plain."""
        wide = _fit(choice, choice.index.shape[-1] + block)
        at = whole[:, None, None] + jnp.arange(block)
        at = jnp.broadcast_to(at, (*self.held.k.shape[:2], block))
        index = jnp.take_along_axis(wide.index, at, axis=-1)
        live = jnp.take_along_axis(wide.live, at, axis=-1)
        picked = Choice(index, live)
        return Tail(
            keys=take(self.held.k, picked),
            values=take(self.held.v, picked),
            positions=self.positions(picked),
            used=(counts - whole).astype(jnp.int32),
        )

    def ragged(self, evict: Eviction, priorities: Scores) -> LayerCache:
        """One flat buffer whose heads share the layer's slots."""
        share, multiple = self.share, self.store.multiple
        rows, spec = len(self.lengths), self.spec
        ways = shards.ways_of(self.layout, rows, spec)
        each, _ = shards.local(self.layout, spec, ways)
        capacity = -(-each.slots // multiple) * multiple
        if evict.budget.surveys:
            assert share.heads is not None
            heads = share.heads
        else:
            assert share.sure is not None and share.total is not None
            given = folded((priorities, share.sure), ways)
            heads = head_counts(*given, shards.parted(share.total, ways), capacity)
        if self.differentiable and ways > 1:  # one buffer, of as many from each device
            heads = jnp.moveaxis(heads.reshape(ways, rows, -1), 0, 1).reshape(rows, -1)
            ways, capacity = 1, -(-ways * each.slots // multiple) * multiple
        flat = choose_flat(folded(priorities, ways), heads, capacity)
        made = self.merged(flat)
        k, v, at = folded((made.held.k, made.held.v, made.held.positions), ways)
        positions = at[jnp.arange(len(at))[:, None], flat.head, flat.index]
        positions = jnp.where(flat.live, positions, EMPTY)
        part = Ragged(
            keys=self.keys(take_flat(k, flat), flat.live, positions),
            values=self.values(take_flat(v, flat), flat.live, positions),
            positions=positions,
            offsets=flat.offsets,
        )
        return self.layer((part,), self.tail(self.room))

    def bounded(self, evict: Eviction, priorities: Scores, interval: int) -> LayerCache:
        """A body that decode-time eviction keeps within its slots."""
        slots, memory = self.layout.slots, self.observed.memory
        assert memory is not None
        limit = self.share.counts
        if evict.budget.keep is None:  # a short prompt's body grows up to its bound
            limit = jnp.full_like(limit, slots)
        choice = _fit(choose(priorities, self.share.counts, slots), slots)

        def late(x: Array) -> Array:
            return jnp.zeros((*x.shape[:2], interval, *x.shape[3:]), x.dtype)

        tracking = Tracking(
            body=jax.tree.map(lambda x: _moved(x, choice), memory.slots),
            tail=jax.tree.map(late, memory.slots),
            row=memory.row,
            limit=limit,
        )
        return self.layer(
            (self.merged(choice).part(choice, slots),),
            self.tail(interval),
            tracking=tracking,
            folding=Folding(score=evict.score, merge=evict.merge),
        )

    def decoupled(self, priorities: Scores) -> LayerCache:
        """Tokens with key and value, and tokens whose key alone is kept."""
        n_both, n_keys = self.share.full, self.share.counts
        full = choose(priorities, n_both, self.layout.full)
        rank = ranks(priorities)
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
        multiple = self.store.keys.append_multiple
        choice = _fit(choice, -(-capacity // multiple) * multiple)
        positions = self.positions(choice)
        values = take(self.held.v, choice).astype(jnp.float32)
        count = jnp.maximum(jnp.sum(choice.live, axis=-1), 1)
        mean = jnp.sum(values, axis=2) / count[..., None].astype(jnp.float32)
        keys = take(self.held.k, choice)
        return KeysOnly(
            keys=self.keys(keys, choice.live, positions),
            rest=mean.astype(self.held.v.dtype),
            positions=positions,
        )


def _moved(x: Array, choice: Choice) -> Array:
    """`[B, K, S, ...]` of all tokens as that of the slots; anything in free ones."""
    index = choice.index.reshape(*choice.index.shape, *(1,) * (x.ndim - 3))
    return jnp.take_along_axis(x, index, axis=2)


def _fit(choice: Choice, slots: int) -> Choice:
    """Padded with free slots, or cut, to `slots`."""
    short = slots - choice.index.shape[-1]
    if short <= 0:
        return Choice(choice.index[..., :slots], choice.live[..., :slots])
    pad = [(0, 0), (0, 0), (0, short)]
    return Choice(jnp.pad(choice.index, pad), jnp.pad(choice.live, pad))
