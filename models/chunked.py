"""Rows read chunk by chunk: `(held, chunk) -> (hidden states, held)`.

`Chunking.read` is the step of a pass in memory that does not grow with the row: the
tokens of a chunk go through all layers, attend to what each layer holds of those before
them, and what is held is compressed again (`kvjax.compress.rolling`). It says which
tokens stayed; `Chunking.replay` is the same step with these decisions given, and has a
gradient.

A layer in which nothing is dropped holds a slot for every token of the row, in order.
`replay` reads the slots in front of its chunk only, so it may be given what such a
layer holds at the end.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache import Memory
from kvjax.compress.config import Compression
from kvjax.compress.rolling import (
    Rolled,
    attend,
    decided,
    joined,
    kept_of,
    nothing_held,
    packed,
    unpacked,
)
from kvjax.compress.rolling_plan import Rolling, counts_of, rolling_of
from kvjax.depth import Loop, members
from kvjax.models.config import DecoderConfig
from kvjax.models.decoder import Attending, Decoder
from kvjax.turns import take
from kvjax.types import EMPTY, LayerInputs, LayerSpec, loops_of, pytree


@pytree
class Holding:
    """What a group of alike layers holds between two chunks.

    Attributes:
        tokens: keys, values and positions, with a first axis for the layers.
        memory: of the score, where tokens are dropped, likewise.
    """

    tokens: Rolled
    memory: Memory | None = None


@pytree
class Held:
    """What all layers hold between two chunks.

    Attributes:
        groups: by groups of layers that are alike.
        seen: tokens of each row so far.
        column: of the rows, the next one to be read.
    """

    groups: tuple[Holding, ...]
    seen: Int[Array, "B"]
    column: Int[Array, ""]


Kept = tuple[Array | None, ...]
"""By groups of layers, the decisions behind a chunk, packed; None: all stay."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunking:
    """Reading rows in chunks under a compression; static.

    Attributes:
        c: what is done behind every chunk.
        specs: all layers.
        kinds: what is done in each.
        tokens: of a row; layers that drop nothing hold as many.
        dtype: of keys and values.
    """

    c: Compression
    specs: tuple[LayerSpec, ...]
    kinds: tuple[Rolling, ...]
    tokens: int
    dtype: jnp.dtype

    @classmethod
    def of(
        cls, c: Compression, specs: Sequence[LayerSpec], tokens: int, dtype: Any
    ) -> Self:
        """Of rows of `tokens`; `check_rolling` has let `c` pass."""
        kinds = rolling_of(c, specs, tokens, dtype)
        return cls(
            c=c,
            specs=tuple(specs),
            kinds=kinds,
            tokens=tokens,
            dtype=jnp.dtype(dtype),
        )

    @property
    def loops(self) -> tuple[Loop, ...]:
        """Which layers are read alike."""
        return loops_of(self.specs, self.kinds)

    @property
    def grows(self) -> tuple[bool, ...]:
        """Of each group of layers whether it drops nothing."""
        return tuple(self.kinds[group.start].slots is None for group in self._groups)

    @property
    def _groups(self) -> tuple[range, ...]:
        return members(self.loops)

    def start(self, config: DecoderConfig, rows: int) -> Held:
        """What is held in front of the first chunk: nothing."""
        found = []
        for group in self._groups:
            spec, kind = self.specs[group.start], self.kinds[group.start]
            asked = self._padding(config, spec, rows)
            if kind.evict is None or kind.slots is None:
                blank = jnp.zeros(
                    (rows, spec.num_kv_heads, self.tokens, spec.head_dim), self.dtype
                )
                free = jnp.full(blank.shape[:3], EMPTY, jnp.int32)
                one = Holding(tokens=Rolled(keys=blank, values=blank, positions=free))
            else:
                tokens, memory = nothing_held(asked, kind.evict, kind.slots)
                one = Holding(tokens=tokens, memory=memory)
            turns = len(group)
            stacked = jax.tree.map(
                lambda x, n=turns: jnp.broadcast_to(x, (n, *x.shape)), one
            )
            found.append(stacked)
        seen = jnp.zeros((rows,), jnp.int32)
        return Held(groups=tuple(found), seen=seen, column=jnp.int32(0))

    def read(
        self,
        model: Decoder,
        held: Held,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        **how: Any,
    ) -> tuple[Float[Array, "B T E"], Held, Kept]:
        """One chunk: its hidden states, what is held behind it, and what stayed.

        Args:
            model: the decoder.
            held: in front of the chunk.
            tokens: the chunk, right-padded.
            positions: absolute ones, `EMPTY` at padding.
            how: as of `Decoder.run`.
        """
        start = held.column
        seen = jnp.maximum(held.seen, jnp.max(positions, axis=1) + 1)
        counts = counts_of(self.c, self.specs, self.kinds, seen, self.dtype)

        def step(inputs: LayerInputs, state: Any, past: Holding):
            kind: Rolling = inputs.depth.kind
            both = joined(self._before(past.tokens, kind, start), inputs)
            out = attend(inputs, both).out
            if past.memory is None:
                return out, state, (_own(inputs), None)
            assert kind.slots is not None
            mine = take(counts, jnp.asarray(inputs.depth.layer))
            given = (past.memory, inputs, both, seen, kind, mine)
            kept, memory = decided(*given)
            left = kept_of(both, kept, kind.slots)
            return out, state, (Holding(tokens=left, memory=memory), packed(kept))

        found = model.run(tokens, positions, self._attending(step, held.groups), **how)
        after, kept = zip(*found.left, strict=True)
        groups = self._written(held.groups, after, start)
        column = start + tokens.shape[1]
        return found.hidden, Held(groups=groups, seen=seen, column=column), kept

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
            kind: Rolling = inputs.depth.kind
            before, bits = past
            both = joined(self._before(before, kind, start), inputs)
            out = attend(inputs, both).out
            if bits is None:
                return out, state, _own(inputs).tokens
            assert kind.slots is not None
            chosen = unpacked(bits, both.positions.shape[-1])
            return out, state, kept_of(both, chosen, kind.slots)

        past = tuple(zip(held, kept, strict=True))
        attention = self._attending(step, past)
        found = model.run(tokens, positions, attention, **how)
        return found.hidden, found.left

    def _attending(self, step: Any, past: tuple[Any, ...]) -> Attending:
        return Attending(step=step, kinds=self.kinds, loops=self.loops, past=past)

    def _before(self, held: Rolled, kind: Rolling, start: Any) -> Rolled:
        """What a layer holds in front of a chunk."""
        if kind.slots is not None:
            return held
        column = jnp.arange(held.positions.shape[-1])
        positions = jnp.where(column < start, held.positions, EMPTY)
        return dataclasses.replace(held, positions=positions)

    def _written(
        self, held: Sequence[Holding], after: Sequence[Holding], start: Any
    ) -> tuple[Holding, ...]:
        """What is held, with a chunk's own tokens in layers that drop nothing."""

        def put(old: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(
                old, new.astype(old.dtype), start, axis=3
            )

        return tuple(
            jax.tree.map(put, old, new) if grows else new
            for old, new, grows in zip(held, after, self.grows, strict=True)
        )

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


def _own(inputs: LayerInputs) -> Holding:
    """A chunk's own tokens."""
    positions = jnp.broadcast_to(inputs.positions[:, None], inputs.k.shape[:3])
    return Holding(tokens=Rolled(keys=inputs.k, values=inputs.v, positions=positions))
