"""`LayerCache` and `KVCache`: values, never mutated; one layer attends and grows."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.folding import fold
from kvjax.cache.parts import AbstractPart, Growth, Slots
from kvjax.cache.tail import Tail
from kvjax.cache.tracking import Folding, Tracking, track
from kvjax.depth import Loop, members
from kvjax.pallas_kernels.partial import Partial, merge
from kvjax.turns import Turn, take
from kvjax.types import LayerInputs, LayerSpec, nbytes, pytree, static


@pytree
class LayerCache:
    """The cache of one layer: parts that attend by themselves, and a plain tail.

    Or those of several layers that compute the same: arrays then have a first axis for
    the layers, and `turn` says which one is meant (`kvjax.turns`).

    Attributes:
        parts: compressed bodies; `parts[0]` is the one that grows or is folded into.
        tail: the newest tokens, plain.
        tracking: what decode-time eviction remembers, or None.
        spec: the layer's attention.
        growth: full tails move into the body as encoded blocks, or None.
        folding: full tails are folded into a bounded body, or None.
    """

    parts: tuple[AbstractPart, ...]
    tail: Tail
    tracking: Tracking | None = None
    spec: LayerSpec = static()
    growth: Growth | None = static(default=None)
    folding: Folding | None = static(default=None)

    def layer(self, turn: int) -> Self:
        """One layer's cache, where this is that of several."""
        return dataclasses.replace(
            self,
            parts=tuple(part.layer(turn) for part in self.parts),
            tail=self.tail.layer(turn),
            tracking=take(self.tracking, turn),
        )

    def attend(
        self, inputs: LayerInputs, turn: Turn = None
    ) -> tuple[Float[Array, "B H T D"], Self]:
        """Attention of new tokens over the cache and themselves; the cache after.

        Where full tails move into a body, tokens up to the next full tail go together.
        """
        b, _, tokens, _ = inputs.q.shape
        if self.growth is None and self.folding is None:
            cache = self._append(inputs, turn)
            return merge(cache._read(inputs, turn)).out, cache
        if tokens == 1:
            return self._step(inputs, turn)
        width = min(tokens, self.tail.capacity)
        total = jnp.sum(inputs.positions >= 0, axis=1)

        def one(carry, _):
            cache, done, out = carry
            left = cache.tail.capacity - take(cache.tail.used, turn)
            count = jnp.minimum(jnp.minimum(left, width), total - done)
            index = done[:, None] + jnp.arange(width)
            mine = jnp.arange(width) < count[:, None]
            given = inputs.taken(jnp.minimum(index, tokens - 1), mine)
            found, cache = cache._step(given, turn)
            at = (jnp.arange(b)[:, None], jnp.where(mine, index, tokens))
            found = jnp.moveaxis(found, 2, 1)
            return (cache, done + count, out.at[at].set(found, mode="drop")), None

        out = jnp.zeros((b, tokens, *inputs.q.shape[1::2]), jnp.float32)
        start = (self, jnp.zeros((b,), jnp.int32), out)
        # At least one token first, for a tail may be all but full, then full tails.
        steps = 1 + -(-(tokens - 1) // width)
        (cache, _, out), _ = jax.lax.scan(one, start, length=steps)
        return jnp.moveaxis(out, 1, 2), cache

    def _append(self, inputs: LayerInputs, turn: Turn) -> Self:
        tail = self.tail.append(inputs.k, inputs.v, inputs.positions, turn)
        return dataclasses.replace(self, tail=tail)

    def _read(self, inputs: LayerInputs, turn: Turn) -> list[Partial]:
        """Attention over every part by itself, the tail last."""
        read = (inputs.q, inputs.positions, self.spec, None, turn)
        return [part.attend(*read) for part in (*self.parts, self.tail)]

    def _step(self, inputs: LayerInputs, turn: Turn) -> tuple[Array, Self]:
        """Tokens that fit the tail: append, attend, move full tails into the body."""
        cache = self._append(inputs, turn)
        parts = cache._read(inputs, turn)
        read = merge(parts)
        if self.folding is not None:
            used = take(self.tail.used, turn)
            if others := parts[1:-1]:  # a prefix
                inputs = dataclasses.replace(inputs, elsewhere=merge(others).lse)
            cache = cache._track(inputs, used, read.lse, turn)
        full = take(cache.tail.used, turn) >= cache.tail.capacity
        # The body is read above and written below; nothing else puts that in order.
        out, cache = jax.lax.optimization_barrier((read.out, cache))
        if self.folding is None:
            return out, cache._grow(full, turn)
        return out, cache._fold(full, inputs.depth.layer, turn)

    def _track(self, inputs: LayerInputs, used: Array, lse: Array, turn: Turn) -> Self:
        assert self.folding is not None and self.tracking is not None
        seen = (inputs, used, lse, self._body(), self.tail, turn)
        tracking = track(self.folding.score, self.tracking, *seen)
        return dataclasses.replace(self, tracking=tracking)

    def _body(self) -> Slots:
        body = self.parts[0]
        assert isinstance(body, Slots)
        return body

    def _fold(self, rows: Bool[Array, "B"], layer: Any, turn: Turn) -> Self:
        assert self.folding is not None and self.tracking is not None
        moved = (self._body(), self.tail, self.spec, rows, layer, turn)
        body, tail, tracking = fold(self.folding, self.tracking, *moved)
        parts = (body, *self.parts[1:])
        return dataclasses.replace(self, parts=parts, tail=tail, tracking=tracking)

    def _grow(self, rows: Bool[Array, "B"], turn: Turn) -> Self:
        assert self.growth is not None
        tail = take(self.tail, turn)
        body = self.parts[0].grow(tail, rows, self.growth, self.spec, turn)
        parts, tail = (body, *self.parts[1:]), self.tail.emptied(rows, turn)
        return dataclasses.replace(self, parts=parts, tail=tail)

    @property
    def overflow(self) -> Bool[Array, "*layers B"]:
        """Rows that were given more tokens than fit; their results are wrong."""
        over = self.tail.used > self.tail.capacity
        free = self.parts[0].free if self.parts else None
        return over if free is None else over | (free < 0)

    @property
    def room(self) -> Int[Array, "*layers B"] | None:
        """Tokens that still fit into each row, or None if the layer is bounded."""
        if self.folding is not None:
            return None
        left = self.tail.capacity - self.tail.used
        free = self.parts[0].free if self.parts else None
        if self.growth is None or free is None:
            return left
        # A tail is moved as soon as it is full: the last slot must stay free unless
        # the body takes another block.
        return left - 1 + free // self.growth.block * self.growth.block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a cache comes from; two caches mix only if these are equal.

    Attributes:
        model: digest of the configuration of the model.
        compression: the compression's YAML, canonical.
        query_aware: whether scores saw the question: if so, it is nobody's prefix.
    """

    model: str
    compression: str
    query_aware: bool


@pytree
class KVCache:
    """The keys and values of a batch of sequences, a value.

    Attributes:
        groups: caches of layers that compute the same, each with a first axis for them.
        length: tokens seen by each row, the position of its next one.
        loops: which layers are in which group, see `kvjax.depth`.
        provenance: what made it.
    """

    groups: tuple[LayerCache, ...]
    length: Int[Array, "B"]
    loops: tuple[Loop, ...] = static()
    provenance: Provenance | None = static(default=None)

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return sum(map(len, members(self.loops)))

    @property
    def layers(self) -> tuple[LayerCache, ...]:
        """The cache of every layer by itself: a copy, to look at."""
        found = {}
        for group, numbers in zip(self.groups, members(self.loops), strict=True):
            found |= {n: group.layer(turn) for turn, n in enumerate(numbers)}
        return tuple(found[n] for n in range(len(found)))

    @property
    def nbytes(self) -> int:
        """Bytes held, side state (positions, scales, statistics) included."""
        return nbytes(self)

    @property
    def rooms(self) -> np.ndarray | None:
        """Tokens that still fit into each row, or None if the cache is bounded.

        Reads the device; not for use under `jit`.
        """
        rooms = [group.room for group in self.groups]
        known = [np.asarray(room).min(axis=0) for room in rooms if room is not None]
        return np.min(known, axis=0) if known else None

    @property
    def room(self) -> int | None:
        """Tokens that still fit into every row, see `rooms`."""
        rooms = self.rooms
        return None if rooms is None else int(rooms.min())

    def settled(self) -> Self:
        """The same in arrays cut to what the data need; not for use under `jit`."""
        groups = tuple(
            dataclasses.replace(g, parts=tuple(part.settled() for part in g.parts))
            for g in self.groups
        )
        return dataclasses.replace(self, groups=groups)

    def kept_positions(self, layer: int) -> list[list[np.ndarray]]:
        """Sorted original positions still attended, per row and KV head."""
        for group, numbers in zip(self.groups, members(self.loops), strict=True):
            if layer in numbers:
                parts, turn = (*group.parts, group.tail), numbers.index(layer)
                break
        else:
            most = self.num_layers - 1
            raise ValueError(f"`layer` must be in 0 .. {most}; got {layer!r}.")
        held = [part.live_positions(turn) for part in parts]
        rows = []
        for row in zip(*held, strict=True):
            heads = [np.sort(np.concatenate(head)) for head in zip(*row, strict=True)]
            rows.append(heads)
        return rows

    def _repr_pretty_(self, printer, cycle):
        from kvjax.summary import describe

        printer.text(describe(self))

    def __treescope_repr__(self, path, subtree_renderer):
        from kvjax.summary import as_treescope

        return as_treescope(self, path)
