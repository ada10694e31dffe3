"""`KVCache`: all layers of a batch of sequences; a value, never mutated."""

import dataclasses
import os
from typing import Annotated, Self

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

from kvjax import axes
from kvjax.cache.layer import LayerCache
from kvjax.cache.placement import Body, host_nbytes, placed
from kvjax.cache.provenance import Provenance
from kvjax.cache.shared import Shared
from kvjax.depth import Loop, members
from kvjax.fields import Range, fit
from kvjax.memory import check_host
from kvjax.types import nbytes_once, pytree, static

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
        return nbytes_once(self)

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
        known = [axes.as_numpy(room).min(axis=0) for room in rooms if room is not None]
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
