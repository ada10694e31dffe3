"""`LayerCache` and `KVCache`: values, never mutated; one layer attends and grows."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Annotated, Any, Self

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from kvjax import axes
from kvjax.cache.folding import fold
from kvjax.cache.parts import AbstractPart, Growth, Slots
from kvjax.cache.placement import Body, host_nbytes, placed
from kvjax.cache.provenance import Provenance
from kvjax.cache.shared import Shared
from kvjax.cache.tail import Tail
from kvjax.cache.tracking import Folding, Tracking, track
from kvjax.depth import Loop, members
from kvjax.fields import Range, fit
from kvjax.memory import check_host
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


Front = tuple[tuple[Shared, ...], ...]
"""What rows share, by groups of layers."""


@pytree
class KVCache:
    """The keys and values of a batch of sequences, a value.

    Attributes:
        groups: caches of layers that compute the same, each with a first axis for them.
        length: tokens seen by each row, the position of its next one.
        digest: of these tokens, see `token_digest`; None: unknown.
        loops: which layers are in which group, see `kvjax.depth`.
        provenance: what made it.
    """

    groups: tuple[LayerCache, ...]
    length: Int[Array, "B"]
    digest: UInt32[Array, "B 4"] | None = None
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
        """Bytes held, side state (positions, scales, statistics) included.

        What several rows or layers share counts once.
        """
        return nbytes(list({id(leaf): leaf for leaf in jax.tree.leaves(self)}.values()))

    @property
    def host_nbytes(self) -> int:
        """Of `nbytes` those in the host's memory; the others are the device's."""
        return host_nbytes(self)

    def placed(self, body: Body) -> Self:
        """The same with the bodies of all layers in a memory, `device` or `host`.

        In the host's, a step fetches what it reads of them. Not for use under `jit`.

        Raises:
            ValueError: no such memory, or none on this device; a body that is written
                to at every step.
        """
        fit(body, Body, "body")
        if body == "host" and not isinstance(self.length, jax.core.Tracer):
            check_host(next(iter(self.length.devices())))
        if any(group.folding is not None for group in self.groups):
            raise ValueError(
                "this cache evicts while decoding: its bodies are written to at every "
                f"step, and lie on the device; got body={body!r}. Use a compression "
                "without schedule.interval."
            )
        groups = tuple(
            dataclasses.replace(g, parts=tuple(placed(part, body) for part in g.parts))
            for g in self.groups
        )
        return dataclasses.replace(self, groups=groups)

    @property
    def rooms(self) -> np.ndarray | None:
        """Tokens that still fit into each row, or None if the cache is bounded.

        Reads the device; not for use under `jit`.
        """
        rooms = [group.room for group in self.groups]
        known = [axes.on_host(room).min(axis=0) for room in rooms if room is not None]
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

    @property
    def apart(self) -> tuple[Self, Front]:
        """The rows' own, and by group what they share, which no program returns."""
        own = tuple(group.own for group in self.groups)
        front = tuple(group.front for group in self.groups)
        return dataclasses.replace(self, groups=own), front

    def behind(self, front: Front) -> Self:
        """The same with what rows share in front, by group."""
        groups = zip(self.groups, front, strict=True)
        groups = tuple(group.behind(parts) for group, parts in groups)
        return dataclasses.replace(self, groups=groups)

    def closed(self) -> Self:
        """The same without room for later tokens, as a prefix is held.

        Tails that move into a body stay: they are as large as what moves.
        """
        groups = tuple(
            dataclasses.replace(group, tail=group.tail.taken)
            if group.growth is None and group.folding is None
            else group
            for group in self.groups
        )
        return dataclasses.replace(self, groups=groups)

    def fork(self, rows: int, *, max_new_tokens: int = 64) -> Self:
        """The cache of `rows` rows that all go on from the one row of this one.

        What is held stays where it is, once; what a row adds is its own, and `self`
        stays as it is. Where full tails are encoded, their blocks are the row's own,
        the ones that this cache would have made. A body that goes on evicting
        (`every_tokens`) is copied for every row, since they will drop other tokens.

        Deviation: where a step chooses what it reads (`quest` and the like), it does so
        in the shared body and in what a row has added apart, each within the budget.

        Args:
            rows: of the new cache.
            max_new_tokens: later tokens of each row that must fit.

        Raises:
            ValueError: a cache of several rows, or one that was given more tokens than
                fit; a number below 1.
        """
        fit(rows, Annotated[int, Range(1, 2**31 - 1)], "rows")
        fit(max_new_tokens, Annotated[int, Range(0, 2**31 - 1)], "max_new_tokens")
        if len(self.length) != 1:
            raise ValueError(
                f"`fork` goes on from one row; got a cache of {len(self.length)}. "
                "Prefill what they have in common with a batch of 1."
            )
        room = None if isinstance(self.length, jax.core.Tracer) else self.room
        if room is not None and room < 0:
            raise ValueError(
                f"the cache was given {-room} tokens more than it holds: its row is "
                "wrong, and so would be those of a fork. Prefill again with a larger "
                "`max_new_tokens`."
            )
        groups = tuple(group.forked(rows, max_new_tokens) for group in self.groups)
        length, digest = jax.tree.map(
            lambda x: jnp.repeat(x, rows, axis=0), (self.length, self.digest)
        )
        return dataclasses.replace(self, groups=groups, length=length, digest=digest)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the cache to a directory, to be read by `kvjax.load_cache`.

        Any layout and any codec, what rows share once, and what made it: the digests of
        the model's weights, shape and RoPE, its dtype, the compression, the digest of
        the tokens. A cache that is there already is replaced as a whole, or stays.

        Args:
            directory: made if it is not there.

        Raises:
            ValueError: a directory that cannot be written to or holds something else;
                a cache of which nobody knows what made it, as of one that was made
                under `jit`.
            OSError: it could not be written; what was there before is there still.
        """
        from kvjax.cache.files import save

        save(self, directory)

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
