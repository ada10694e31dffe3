"""Prefill chunk by chunk: what is held is compressed again behind each (`every_chunk`).

All chunks go through one program, whose memory is what is held and one chunk; with a
budget in slots it is the same program however long the prompt. A second one makes the
cache of what is held in the end.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kvjax.axes import as_numpy
from kvjax.cache import Front, KVCache, LayerCache, spread
from kvjax.compress import growing
from kvjax.compress.building import Building
from kvjax.compress.config import Compression
from kvjax.compress.rolling import Holding, observed_of
from kvjax.compress.survey import Layout
from kvjax.depth import Depth, over
from kvjax.models.arrays import is_traced
from kvjax.models.chunked import Chunking, Held
from kvjax.models.config import DecoderConfig
from kvjax.models.decoder import Decoder
from kvjax.models.padding import pad_tokens
from kvjax.models.reading import in_front, marks_of, seen_before
from kvjax.types import EMPTY, LayerSpec, Lengths, Tokens


class _State(NamedTuple):
    """What is handed on from chunk to chunk.

    Attributes:
        groups: what layers hold: overwritten by the next chunk.
        held: the rest of it.
        last: hidden state of each row's last token, once it has been read.
    """

    groups: tuple[Holding, ...]
    held: Held
    last: Float[Array, "B E"]

    @property
    def whole(self) -> Held:
        """All that is held."""
        return dataclasses.replace(self.held, groups=self.groups)

    def after(self, held: Held, last: Array) -> "_State":
        """The same behind a chunk."""
        return _State(held.groups, dataclasses.replace(held, groups=()), last)


def _start(config: DecoderConfig, lengths, before, chunking: Chunking) -> _State:
    """In front of the first chunk."""
    held = chunking.start(config, lengths, before)
    last = jnp.zeros((len(lengths), config.hidden_size), chunking.dtype)
    return _State(held.groups, dataclasses.replace(held, groups=()), last)


def _chunk(
    graph,
    params,
    state: _State,
    front: Front,
    tokens: Int[Array, "B T"],
    before: Int[Array, ""],
    chunking: Chunking,
) -> _State:
    """One chunk; `before` tokens are in front of all rows."""
    model, held = nnx.merge(graph, params), state.whole
    t = tokens.shape[1]
    column = held.column + jnp.arange(t, dtype=jnp.int32)
    inside = column < held.lengths[:, None]
    positions = jnp.where(inside, column + before, EMPTY)
    hidden, after, _ = chunking.read(model, held, tokens, positions, front)
    at = held.lengths - 1 - held.column
    mine = jnp.clip(at, 0, t - 1)[:, None, None]
    found = jnp.take_along_axis(hidden, mine, axis=1)[:, 0]
    here = ((at >= 0) & (at < t))[:, None]
    return state.after(after, jnp.where(here, found, state.last))


def _close(
    graph,
    params,
    state: _State,
    before: Int[Array, ""],
    chunking: Chunking,
    longest: int,
    room: int,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Logits of each row's last token, and the cache of what is held."""
    model, held = nnx.merge(graph, params), state.whole
    c, specs = chunking.c, chunking.specs
    how = (longest, room, chunking.dtype, before, longest, chunking.marks)
    building = Building.of(c, specs, held.lengths, *how)
    groups = chunking.groups

    def kinds(group: int) -> tuple[Layout, LayerSpec]:
        first = groups[group].start
        return building.found.layouts[first], specs[first].kind

    def one(depth: Depth, carry, holding: Holding):
        layout, spec = kinds(depth.group)
        if layout.plan.evict is None:
            return carry, ()
        depth = dataclasses.replace(depth, kind=layout)
        return building.step(depth, carry, observed_of(holding, spec))

    carry, layers = over(building.loops, one, building.start(), held.groups)
    caches: list[LayerCache] = []
    for group, (holding, layer) in enumerate(zip(held.groups, layers, strict=True)):
        layout, spec = kinds(group)
        if layout.plan.evict is None:
            how = (layout, held.lengths, room, spec, chunking.dtype)
            layer = growing.cache_of(holding, *how)
        caches.append(layer)
    cache = spread.laid_out(building.cache(carry, caches))
    return model.logits(state.last), cache


_static = ("graph", "chunking")
_first = jax.jit(_start, static_argnames=("config", "chunking"))


@functools.partial(jax.jit, static_argnames=_static, donate_argnames=("groups",))
def _read(graph, params, groups, held, last, front, tokens, before, chunking):
    """`_chunk`; nothing is overwritten but what layers hold."""
    state = _State(groups, held, last)
    return _chunk(graph, params, state, front, tokens, before, chunking)


_ending = (*_static, "longest", "room")


@functools.partial(jax.jit, static_argnames=_ending, donate_argnames=("grown",))
def _closed(graph, params, grown, held, last, before, chunking, longest, room):
    """`_close`; what is in `grown` becomes the cache as it is, and is not copied."""
    pairs = zip(held.groups, grown, strict=True)
    groups = tuple(it if all_of_it is None else all_of_it for it, all_of_it in pairs)
    state = _State(groups, dataclasses.replace(held, groups=()), last)
    return _close(graph, params, state, before, chunking, longest, room)


def parted(state: _State, chunking: Chunking) -> tuple[Any, Held]:
    """By groups of layers those that drop nothing, and all else that is held."""
    pairs = tuple(zip(state.groups, chunking.grows, strict=True))
    rest = tuple(None if grows else it for it, grows in pairs)
    grown = tuple(it if grows else None for it, grows in pairs)
    return grown, dataclasses.replace(state.held, groups=rest)


def prefill_in_chunks(
    model: Decoder,
    tokens: Tokens,
    lengths: Lengths,
    c: Compression,
    room: int,
    longest: int,
    prefix: KVCache | None = None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Logits of each row's last token, and the cache; nothing is checked.

    Args:
        model: a decoder.
        tokens: padded to some width.
        lengths: of each row.
        c: what is done, behind every chunk.
        room: later tokens that must fit.
        longest: no row has more tokens.
        prefix: of one row, in front of all.
    """
    graph, params = nnx.split(model)
    how = {"longest": longest, "room": room, "marks": marks_of(prefix)}
    given = (model.config.layers, tokens.shape[1], model.dtype)
    chunking = Chunking.of_prompt(c, *given, **how)
    size = chunking.size
    count = -(-tokens.shape[1] // size)
    tokens = pad_tokens(tokens, count * size)
    chunks = jnp.moveaxis(tokens.reshape(len(tokens), count, size), 1, 0)
    before = jnp.asarray(seen_before(prefix), jnp.int32)
    front = in_front(prefix, len(lengths), chunking.loops)
    state = _first(model.config, lengths, before, chunking)
    if is_traced(tokens, lengths, before):

        def step(state: _State, chunk: Array):
            given = (state, front, chunk, before, chunking)
            return _chunk(graph, params, *given), None

        state, _ = jax.lax.scan(step, state, chunks)
    else:
        needed = -(-int(as_numpy(lengths).max()) // size)
        for chunk in chunks[:needed]:
            state = _read(graph, params, *state, front, chunk, before, chunking)
    given = (*parted(state, chunking), state.last)
    return _closed(graph, params, *given, before, chunking, longest, room)
