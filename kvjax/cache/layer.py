"""`LayerCache`: one layer attends and grows; a value, never mutated."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.folding import fold
from kvjax.cache.parts import AbstractPart, Growth, Slots
from kvjax.cache.shared import Shared
from kvjax.cache.tail import Tail
from kvjax.cache.tracking import Folding, Tracking, track
from kvjax.pallas_kernels.partial import Partial, merge
from kvjax.turns import Turn, take
from kvjax.types import LayerInputs, LayerSpec, pytree, static


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

    @property
    def front(self) -> tuple[Shared, ...]:
        """What is shared with other rows: it is read, and never changes."""
        return tuple(part for part in self.parts if isinstance(part, Shared))

    @property
    def own(self) -> Self:
        """The same without `front`."""
        parts = tuple(part for part in self.parts if not isinstance(part, Shared))
        return dataclasses.replace(self, parts=parts)

    def behind(self, front: Sequence[Shared]) -> Self:
        """The same with `front` in front of it."""
        return dataclasses.replace(self, parts=(*self.parts, *front))

    def attend(
        self, inputs: LayerInputs, turn: Turn = None, front: Sequence[Shared] = ()
    ) -> tuple[Float[Array, "B H T D"], Self]:
        """Attention of new tokens over the cache and themselves; the cache after.

        Where full tails move into a body, tokens up to the next full tail go together.

        Args:
            inputs: the tokens.
            turn: which layer's, where the cache is that of several.
            front: what is shared with other rows, which `self` does not hold.
        """
        b, _, tokens, _ = inputs.q.shape
        if self.growth is None and self.folding is None:
            cache = self._append(inputs, turn)
            return merge(cache._read(inputs, turn, front)).out, cache
        if tokens == 1:
            return self._step(inputs, turn, front)
        width = min(tokens, self.tail.capacity)
        total = jnp.sum(inputs.positions >= 0, axis=1)

        def one(carry, _):
            cache, done, out = carry
            left = cache.tail.capacity - take(cache.tail.used, turn)
            count = jnp.minimum(jnp.minimum(left, width), total - done)
            index = done[:, None] + jnp.arange(width)
            mine = jnp.arange(width) < count[:, None]
            given = inputs.taken(jnp.minimum(index, tokens - 1), mine)
            found, cache = cache._step(given, turn, front)
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

    def _read(
        self, inputs: LayerInputs, turn: Turn, front: Sequence[Shared]
    ) -> list[Partial]:
        """Attention over every part by itself: its own, the tail, those in front."""
        read = (inputs.q, inputs.positions, self.spec, None, turn)
        return [part.attend(*read) for part in (*self.parts, self.tail, *front)]

    def _step(
        self, inputs: LayerInputs, turn: Turn, front: Sequence[Shared]
    ) -> tuple[Array, Self]:
        """Tokens that fit the tail: append, attend, move full tails into the body."""
        cache = self._append(inputs, turn)
        parts = cache._read(inputs, turn, front)
        read = merge(parts)
        if self.folding is not None:
            used = take(self.tail.used, turn)
            if front:
                others = merge(parts[-len(front) :])
                inputs = dataclasses.replace(inputs, elsewhere=others.lse)
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

    def in_front(self, rows: int) -> tuple[Shared, ...]:
        """All that layers of one row hold, for `rows` that come behind it."""
        parts = (*self.parts, self.tail.taken)
        return tuple(Shared.of(part, rows) for part in parts if part.positions.size)

    def forked(self, rows: int, room: int) -> Self:
        """Of one row, for `rows` that go on with `room` tokens each; see `fork`."""
        if self.folding is not None:
            own = _repeated(self.own, rows)
            return own.behind([Shared.of(part, rows) for part in self.front])
        if (growth := self.growth) is None:
            tail = self.tail.fresh(rows, room)
            return dataclasses.replace(self, parts=self.in_front(rows), tail=tail)
        # The tail's tokens will be in a block with later ones.
        slots = max((growth.block - 1 + room) // growth.block, 1) * growth.block
        how = (rows, slots, growth, self.spec, self.tail.keys.dtype)
        own = self.parts[0].blank(*how)
        parts = (own, *(Shared.of(part, rows) for part in self.parts))
        tail = _repeated(self.tail, rows)
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


def _repeated[T](tree: T, rows: int) -> T:
    """Of several layers and one row, that row `rows` times."""
    return jax.tree.map(lambda x: jnp.repeat(x, rows, axis=1), tree)
