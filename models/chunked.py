"""Rows read chunk by chunk: `(held, chunk) -> (hidden states, held)`.

`Chunking.read` is the step of a pass in memory that does not grow with the row: the
tokens of a chunk go through all layers, attend to what each layer holds of those before
them, and what is held is compressed again (`kvjax.compress.rolling`). It says which
tokens stayed; `Chunking.replay` is the same step with these decisions given, and has a
gradient.

A layer in which nothing is dropped holds a slot for every token of the row, in order
(`kvjax.compress.growing`). `replay` reads the slots in front of its chunk only, so it
may be given what such a layer holds at the end.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax import exact
from kvjax.cache import Front
from kvjax.codecs import PlainArray
from kvjax.compress import growing, rolling
from kvjax.compress.config import Compression
from kvjax.compress.rolled import Rolled, joined, kept_of, packed, unpacked
from kvjax.compress.rolling import Holding, Place, attend
from kvjax.compress.survey import Layout, Share, survey
from kvjax.depth import Loop, members
from kvjax.models.config import DecoderConfig
from kvjax.models.decoder import Attending, Decoder
from kvjax.types import EMPTY, LayerInputs, LayerSpec, Lengths, loops_of, pytree


@pytree
class Held:
    """What all layers hold between two chunks.

    Attributes:
        groups: by groups of layers that are alike.
        seen: tokens of each row so far, those in front of it among them.
        column: of the rows, the next one to be read.
        lengths: tokens of each row in the end, those in front of it not counted.
        share: what each layer gets of rows of these lengths.
    """

    groups: tuple[Holding, ...]
    seen: Int[Array, "B"]
    column: Int[Array, ""]
    lengths: Int[Array, "B"]
    share: Share


Kept = tuple[Array | None, ...]
"""By groups of layers, the decisions behind a chunk, packed; None: all stay."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunking:
    """Reading rows in chunks under a compression; static.

    Attributes:
        c: what is done behind every chunk.
        specs: all layers.
        layouts: what is done in each.
        longest: no row has more tokens; 0 where that does not matter.
        columns: of the rows, padded to whole chunks; 0 where no layer holds as many.
        room: later tokens that must fit; 0 likewise.
        size: tokens of a chunk of a prompt; 0 of other rows.
        dtype: of keys and values.
        marks: see `Building`.
    """

    c: Compression
    specs: tuple[LayerSpec, ...]
    layouts: tuple[Layout, ...]
    longest: int
    columns: int
    room: int
    dtype: jnp.dtype
    marks: tuple[int, ...] = ()
    size: int = 0

    @classmethod
    def of(
        cls,
        c: Compression,
        specs: Sequence[LayerSpec],
        columns: int,
        dtype: Any,
        *,
        longest: int | None = None,
        room: int = 0,
        marks: tuple[int, ...] = (),
    ) -> Self:
        """Of rows of `columns`, padding included; something has let `c` pass.

        Args:
            c: what is done.
            specs: all layers.
            columns: tokens of a row, a multiple of those of a chunk.
            dtype: of keys and values.
            longest: tokens of a row at most; None: all of them.
            room: later tokens that must fit.
            marks: see `Building`.
        """
        specs, none = tuple(specs), jnp.zeros((1,), jnp.int32)
        found = survey(c, specs, none, longest or columns, dtype)
        grows = any(layout.plan.evict is None for layout in found.layouts)
        shares = any(part.evict and part.evict.budget.keep for part in c.parts)
        return cls(
            c=c,
            specs=specs,
            layouts=found.layouts,
            # One program for all lengths where nothing depends on it.
            longest=(longest or columns) if grows or shares else 0,
            columns=columns if grows else 0,
            room=room if grows else 0,
            dtype=jnp.dtype(dtype),
            marks=marks,
        )

    @classmethod
    def of_prompt(
        cls,
        c: Compression,
        specs: Sequence[LayerSpec],
        width: int,
        dtype: Any,
        **how: Any,
    ) -> Self:
        """Of prompts of `width`, in the chunks of `c`; the rest as of `of`."""
        assert c.schedule.chunk is not None
        multiple = c.chunk_multiple
        size = min(c.schedule.chunk, -(-width // multiple) * multiple)
        columns = -(-width // size) * size
        made = cls.of(c, specs, columns, dtype, **how)
        return dataclasses.replace(made, size=size)

    @property
    def loops(self) -> tuple[Loop, ...]:
        """Which layers are read alike."""
        return loops_of(self.specs, self.layouts, self.marks)

    @property
    def grows(self) -> tuple[bool, ...]:
        """Of each group of layers whether it drops nothing."""
        return tuple(
            self.layouts[group.start].plan.evict is None for group in self.groups
        )

    @property
    def groups(self) -> tuple[range, ...]:
        """The layers of each group."""
        return members(self.loops)

    def start(
        self,
        config: DecoderConfig,
        lengths: Lengths,
        before: Int[Array, ""] | int = 0,
    ) -> Held:
        """What is held in front of the first chunk: nothing.

        Args:
            config: of the model.
            lengths: tokens of each row in the end.
            before: tokens in front of all rows.
        """
        found = []
        for group in self.groups:
            spec, layout = self.specs[group.start], self.layouts[group.start]
            asked = self._padding(config, spec, len(lengths))
            if layout.plan.evict is None:
                slots = growing.capacity(layout, self.columns, self.room)
                one = growing.nothing_held(asked, layout, slots)
            else:
                if self.marks:
                    elsewhere = jnp.zeros(asked.q.shape[:3], jnp.float32)
                    asked = dataclasses.replace(asked, elsewhere=elsewhere)
                one = rolling.nothing_held(asked, layout)
            turns = len(group)
            stacked = jax.tree.map(
                lambda x, n=turns: jnp.broadcast_to(x, (n, *x.shape)), one
            )
            found.append(stacked)
        longest = self.longest or exact.LONGEST
        share = survey(self.c, self.specs, lengths, longest, self.dtype).share
        return Held(
            groups=tuple(found),
            seen=jnp.full(lengths.shape, before, jnp.int32),
            column=jnp.int32(0),
            lengths=lengths,
            share=share,
        )

    def read(
        self,
        model: Decoder,
        held: Held,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        front: Front | None = None,
        **how: Any,
    ) -> tuple[Float[Array, "B T E"], Held, Kept]:
        """One chunk: its hidden states, what is held behind it, and what stayed.

        Args:
            model: the decoder.
            held: in front of the chunk.
            tokens: the chunk, right-padded.
            positions: absolute ones, `EMPTY` at padding.
            front: what is in front of all rows, by groups of layers; None: nothing.
            how: as of `Decoder.run`.
        """
        seen = jnp.maximum(held.seen, jnp.max(positions, axis=1) + 1)
        at = Place(
            column=held.column, seen=seen, lengths=held.lengths, share=held.share
        )

        def step(inputs: LayerInputs, groups: tuple[Holding, ...]):
            mine = inputs.depth.group
            layout: Layout = inputs.depth.kind
            parts = () if front is None else front[mine]
            given = (groups[mine], inputs, at, layout, inputs.depth.turn, parts)
            if layout.plan.evict is None:
                (out, after), kept = growing.read(*given), None
            else:
                out, after, stayed = rolling.read(*given)
                kept = packed(stayed)
            return out, (*groups[:mine], after, *groups[mine + 1 :]), kept

        reading = self._attending(step, state=held.groups)
        found = model.run(tokens, positions, reading, **how)
        after = dataclasses.replace(
            held,
            groups=found.state,
            seen=seen,
            column=held.column + tokens.shape[1],
        )
        return found.hidden, after, found.left

    def replay(
        self,
        model: Decoder,
        held: Sequence[Rolled],
        kept: Kept,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        start: Int[Array, ""] | int,
        **how: Any,
    ) -> tuple[Float[Array, "B T E"], tuple[Rolled, ...]]:
        """`read` with the decisions given: hidden states, and what is held behind.

        Args:
            model: the decoder.
            held: in front of the chunk, by groups of layers.
            kept: what `read` said.
            tokens: the chunk.
            positions: as `read` got them.
            start: the chunk's first column.
            how: as of `Decoder.run`.

        Returns:
            What `read` returns, but of layers that drop nothing the chunk's own tokens
            alone, and no memories of scores.
        """

        def step(inputs: LayerInputs, state: Any, past: tuple[Rolled, Array | None]):
            layout: Layout = inputs.depth.kind
            before, bits = past
            if bits is None:
                before = _in_front(before, start)
            both = joined(before, inputs)
            out = attend(inputs, both).out
            if bits is None:
                return out, state, _own(inputs)
            chosen = unpacked(bits, both.positions.shape[-1])
            return out, state, kept_of(both, chosen, layout)

        past = tuple(zip(held, kept, strict=True))
        attention = self._attending(step, past=past)
        found = model.run(tokens, positions, attention, **how)
        return found.hidden, found.left

    def _attending(
        self, step: Any, state: Any = None, past: tuple[Any, ...] = ()
    ) -> Attending:
        how = {"kinds": self.layouts, "loops": self.loops}
        return Attending(step=step, state=state, past=past, **how)

    def _padding(
        self, config: DecoderConfig, spec: LayerSpec, rows: int
    ) -> LayerInputs:
        """A token that is none, as a layer of the model would hand it over."""

        def blank(*shape: int) -> Array:
            return jnp.zeros(shape, self.dtype)

        heads, kv_heads, d = spec.num_heads, spec.num_kv_heads, spec.head_dim
        retention = None
        if config.evictor is not None:
            retention = jnp.zeros((rows, kv_heads, 1), jnp.float32)
        return LayerInputs(
            q=blank(rows, heads, 1, d),
            k=blank(rows, kv_heads, 1, d),
            v=blank(rows, kv_heads, 1, d),
            positions=jnp.full((rows, 1), EMPTY, jnp.int32),
            o_proj=blank(heads, d, config.hidden_size),
            retention=retention,
            spec=spec,
        )


def plainly(holding: Holding) -> Rolled:
    """The tokens of layers that hold them plain."""
    if isinstance(holding.tokens, Rolled):
        return holding.tokens
    keys, values = holding.tokens.keys, holding.tokens.values
    assert isinstance(keys, PlainArray) and isinstance(values, PlainArray)
    at = holding.tokens.positions
    return Rolled(keys=keys.data, values=values.data, positions=at)


def _own(inputs: LayerInputs) -> Rolled:
    """A chunk's own tokens."""
    positions = jnp.broadcast_to(inputs.positions[:, None], inputs.k.shape[:3])
    return Rolled(keys=inputs.k, values=inputs.v, positions=positions)


def _in_front(held: Rolled, start: Any) -> Rolled:
    """Of the tokens of a row those in front of a chunk."""
    column = jnp.arange(held.positions.shape[-1])
    positions = jnp.where(column < start, held.positions, EMPTY)
    return dataclasses.replace(held, positions=positions)
