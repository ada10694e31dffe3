"""Compressing the layers of a prompt in order, and the cache that comes of it."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kvjax.cache import (
    ByShard,
    KVCache,
    LayerCache,
    Ragged,
    Slots,
    folded,
    placed,
)
from kvjax.compress import shards
from kvjax.compress.config import Compression
from kvjax.compress.layer import build, handed_on
from kvjax.compress.observe import Observed
from kvjax.compress.pool import aligned, empty_pool, pour
from kvjax.compress.priorities import held_of, own_or_handed
from kvjax.compress.survey import Survey, allotted, survey
from kvjax.depth import Depth, Loop, members, over, regrouped
from kvjax.turns import take
from kvjax.types import LayerSpec, Lengths, loops_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Building:
    """Compressing the layers of a prompt one by one, in order.

    Attributes:
        c: what is done.
        specs: all layers.
        found: what each layer gets.
        lengths: tokens of each row.
        tokens: width of the prompt.
        room: later tokens that must fit.
        dtype: of keys and values.
        before: tokens of a prefix, which the cache does not hold.
        marks: of all layers; those whose marks differ are built apart. Empty: none do.
    """

    c: Compression
    specs: tuple[LayerSpec, ...]
    found: Survey
    lengths: Lengths
    tokens: int
    room: int
    dtype: jnp.dtype
    before: Int[Array, ""] | int = 0
    marks: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        c: Compression,
        specs: tuple[LayerSpec, ...],
        lengths: Lengths,
        tokens: int,
        room: int,
        dtype: jnp.dtype,
        before: Int[Array, ""] | int = 0,
        longest: int | None = None,
        marks: tuple[int, ...] = (),
    ) -> Self:
        """The same, with what each layer gets by the lengths of the rows.

        What it can hold is enough for rows of `longest` tokens; None: of `tokens`.
        """
        return cls(
            c=c,
            specs=specs,
            found=survey(c, specs, lengths, longest or tokens, dtype),
            lengths=lengths,
            tokens=tokens,
            room=room,
            dtype=dtype,
            before=before,
            marks=marks,
        )

    @property
    def loops(self) -> tuple[Loop, ...]:
        """Which layers are built alike."""
        return loops_of(self.specs, self.found.layouts, self.marks)

    def surveyed(self, loops: Sequence[Loop], seen: Sequence[Observed]) -> Self:
        """The same, after a look at what the pass left of all layers.

        Args:
            loops: which layers are together.
            seen: of each of their groups.
        """
        budgets = [layout.plan.evict for layout in self.found.layouts]
        if not any(evict is not None and evict.budget.surveys for evict in budgets):
            return self
        layouts, groups = self.found.layouts, members(loops)

        def one(depth: Depth, handed: Any, observed: Observed):
            evict = layouts[groups[depth.group].start].plan.evict
            wanted = evict is not None and evict.budget.surveys
            if evict is None or (handed is None and not wanted):
                return handed, ()
            held = held_of(observed, self.lengths, depth.layer, self.before)
            how = (observed, held, self.lengths, evict, self.found.of(depth))
            priorities = own_or_handed(*how, handed)
            handed = None if handed is None else priorities
            return handed, (priorities, observed.look) if wanted else ()

        _, left = over(loops, one, self._handed, seen)
        given = regrouped(loops, left, self.loops)
        how = (members(self.loops), given, self.lengths, self.specs)
        return dataclasses.replace(self, found=allotted(self.found, *how))

    def start(self) -> tuple[Any, tuple[Ragged | None, ...]]:
        """What the first layer is handed: priorities, and buffers to be filled."""
        batch, specs = self.lengths.shape[0], self.specs
        pools = []
        for group in members(self.loops):
            layout, pool = self.found.layouts[group.start], None
            if layout.pooled:
                ways = self._ways(group)
                slots = tuple(self._slots(layer, ways) for layer in group)
                how = shards.local(layout, specs[group.start], ways)
                given = (how[0], slots, how[1], batch * ways, self.dtype)
                pool = empty_pool(*given)
            pools.append(pool)
        return self._handed, tuple(pools)

    def _ways(self, group: range) -> int:
        """Pieces of a group's buffer, for devices that split its heads."""
        layout, spec = self.found.layouts[group.start], self.specs[group.start]
        return shards.ways_of(layout, self.lengths.shape[0], spec)

    def _slots(self, layer: int, ways: int) -> int:
        """Slots of a layer in one piece: of each head, or of those that share them."""
        slots = self.found.slots[layer]
        return -(-slots // ways) if self.found.layouts[layer].shared else slots

    @property
    def _handed(self) -> Array | None:
        """What the first layer is handed where layers reuse the choice of others."""
        batch = self.lengths.shape[0]
        return handed_on(self.c, batch, self.specs[0], self.tokens)

    def _pieces(self, group: range) -> tuple[Array, Array]:
        """First slot and number of slots of each layer in its pool, `[L, B]` each."""
        layout, ways = self.found.layouts[group.start], self._ways(group)
        batch = self.lengths.shape[0] * ways
        heads = self.found.share.heads
        evict = layout.plan.evict
        if heads is not None and evict is not None and evict.budget.surveys:
            multiple = layout.plan.store.multiple
            mine = jnp.sum(heads[np.array(group)], axis=-1)
            counts = -(-mine // multiple) * multiple
        else:
            slots = tuple(self._slots(layer, ways) for layer in group)
            sizes = aligned(slots, layout, self.specs[group.start].num_kv_heads // ways)
            counts = jnp.asarray(sizes, jnp.int32)[:, None]
            counts = jnp.broadcast_to(counts, (len(group), batch))
        return jnp.cumsum(counts, axis=0) - counts, counts

    def step(self, depth: Depth, state: Any, observed: Observed):
        """One layer: what it hands on, and its cache but for what went into a pool."""
        handed, pools = state
        layer, priorities = build(
            observed,
            self.lengths,
            depth.kind,
            self.found.of(depth),
            room=self.room,
            layer=depth.layer,
            before=self.before,
            priorities=handed,
        )
        if handed is not None and priorities is not None:
            handed = priorities
        if (pool := pools[depth.group]) is not None:
            (part,) = layer.parts
            assert isinstance(part, Slots | Ragged)
            group = members(self.loops)[depth.group]
            pieces = self._pieces(group)
            if isinstance(part, Slots):
                part = folded(part, self._ways(group))
            pool = pour(pool, part, depth.turn, *take(pieces, depth.turn))
            pools = (*pools[: depth.group], pool, *pools[depth.group + 1 :])
            layer = dataclasses.replace(layer, parts=())
        return (handed, pools), layer

    def cache(self, state: Any, layers: Sequence[LayerCache]) -> KVCache:
        """The cache, of what `step` left."""
        _, pools = state
        groups = []
        numbers = members(self.loops)
        for group, layer, pool in zip(numbers, layers, pools, strict=True):
            if pool is not None:
                store = self.found.layouts[group.start].plan.store
                part, ways = placed(pool, store.place.body), self._ways(group)
                part = part if ways == 1 else ByShard(part=part, ways=ways)
                layer = dataclasses.replace(layer, parts=(part,))
            groups.append(layer)
        length = self.lengths + self.before
        return KVCache(groups=tuple(groups), length=length, loops=self.loops)


def build_cache(
    seen: Sequence[Observed],
    loops: Sequence[Loop],
    specs: tuple[LayerSpec, ...],
    lengths: Lengths,
    c: Compression,
    room: int,
    before: Int[Array, ""] | int = 0,
    longest: int | None = None,
    marks: tuple[int, ...] = (),
) -> KVCache:
    """The cache after a prompt, compressed, of what the pass over it left.

    Args:
        seen: of layers that were looked at alike together.
        loops: which those are.
        specs: all layers.
        lengths: tokens of each prompt.
        c: what is done.
        room: later tokens that must fit.
        before: tokens of a prefix, which the cache does not hold.
        longest: see `Building.of`.
        marks: see `Building`.
    """
    dtype, tokens = seen[0].k.dtype, seen[0].k.shape[-2]
    how = (tokens, room, dtype, before, longest, marks)
    building = Building.of(c, specs, lengths, *how)
    building = building.surveyed(loops, seen)
    layouts, groups = building.found.layouts, members(building.loops)

    def one(depth: Depth, state: Any, observed: Observed):
        kind = layouts[groups[depth.group].start]
        return building.step(dataclasses.replace(depth, kind=kind), state, observed)

    given = regrouped(loops, seen, building.loops)
    state, layers = over(building.loops, one, building.start(), given)
    return building.cache(state, layers)
