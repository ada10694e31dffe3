"""Compressing the layers of a prompt in order, and the cache that comes of it."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax.numpy as jnp

from kvjax.cache import KVCache, LayerCache, Ragged, Slots
from kvjax.compress.config import Compression
from kvjax.compress.layer import build, handed_on
from kvjax.compress.observe import Observed
from kvjax.compress.pool import empty_pool, pour
from kvjax.compress.survey import Survey, survey
from kvjax.depth import Depth, Loop, members, over, regrouped
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
    """

    c: Compression
    specs: tuple[LayerSpec, ...]
    found: Survey
    lengths: Lengths
    tokens: int
    room: int
    dtype: jnp.dtype

    @classmethod
    def of(
        cls,
        c: Compression,
        specs: tuple[LayerSpec, ...],
        lengths: Lengths,
        tokens: int,
        room: int,
        dtype: jnp.dtype,
    ) -> Self:
        """The same, with what each layer gets still to be found out."""
        found = survey(c, specs, lengths, tokens, dtype)
        return cls(
            c=c,
            specs=specs,
            found=found,
            lengths=lengths,
            tokens=tokens,
            room=room,
            dtype=dtype,
        )

    @property
    def loops(self) -> tuple[Loop, ...]:
        """Which layers are built alike."""
        return loops_of(self.specs, self.found.layouts)

    def start(self) -> tuple[Any, tuple[Ragged | None, ...]]:
        """What the first layer is handed: priorities, and buffers to be filled."""
        batch, specs = self.lengths.shape[0], self.specs
        pools = []
        for group in members(self.loops):
            layout, pool = self.found.layouts[group.start], None
            if layout.pooled:
                slots = tuple(self.found.slots[layer] for layer in group)
                spec = specs[group.start]
                pool = empty_pool(self.c, layout, slots, spec, batch, self.dtype)
            pools.append(pool)
        return handed_on(self.c, batch, specs[0], self.tokens), tuple(pools)

    def step(self, depth: Depth, state: Any, observed: Observed):
        """One layer: what it hands on, and its cache but for what went into a pool."""
        priorities, pools = state
        layer, priorities = build(
            observed,
            self.lengths,
            self.c,
            depth.kind,
            self.found.of(depth),
            room=self.room,
            priorities=priorities,
        )
        if not self.c.evict or self.c.evict.unit.reuse == 1:
            priorities = None
        if (pool := pools[depth.group]) is not None:
            (part,) = layer.parts
            assert isinstance(part, Slots | Ragged)
            pool = pour(pool, part, depth.turn)
            pools = (*pools[: depth.group], pool, *pools[depth.group + 1 :])
            layer = dataclasses.replace(layer, parts=())
        return (priorities, pools), layer

    def cache(self, state: Any, layers: Sequence[LayerCache]) -> KVCache:
        """The cache, of what `step` left."""
        _, pools = state
        groups = tuple(
            layer if pool is None else dataclasses.replace(layer, parts=(pool,))
            for layer, pool in zip(layers, pools, strict=True)
        )
        return KVCache(groups=groups, length=self.lengths, loops=self.loops)


def build_cache(
    seen: Sequence[Observed],
    loops: Sequence[Loop],
    specs: tuple[LayerSpec, ...],
    lengths: Lengths,
    c: Compression,
    room: int,
) -> KVCache:
    """The cache after a prompt, compressed, of what the pass over it left.

    Args:
        seen: of layers that were looked at alike together.
        loops: which those are.
        specs: all layers.
        lengths: tokens of each prompt.
        c: what is done.
        room: later tokens that must fit.
    """
    dtype, tokens = seen[0].k.dtype, seen[0].k.shape[-2]
    building = Building.of(c, specs, lengths, tokens, room, dtype)
    layouts, groups = building.found.layouts, members(building.loops)

    def one(depth: Depth, state: Any, observed: Observed):
        kind = layouts[groups[depth.group].start]
        return building.step(dataclasses.replace(depth, kind=kind), state, observed)

    given = regrouped(loops, seen, building.loops)
    state, layers = over(building.loops, one, building.start(), given)
    return building.cache(state, layers)
