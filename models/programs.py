"""The programs of inference, and what they leave, as shapes: nothing is allocated.

What `prefill` and `generate` would run on a model, a batch and a compression, for who
wants to know sizes (`kvjax.planning`), or to compile for a chip that is not here.
"""

import dataclasses
from typing import Any, NamedTuple, Self, final

import jax
import jax.numpy as jnp
from flax import nnx

from kvjax.cache import KVCache
from kvjax.compress.config import Compression
from kvjax.models import chunked_prefill, generation, inference
from kvjax.models.chunked import Chunking
from kvjax.models.config import DecoderConfig
from kvjax.models.decoder import Decoder
from kvjax.models.padding import PROMPT, bucket
from kvjax.models.sampling import Sampling
from kvjax.prefills import AbstractPrefill


class Program(NamedTuple):
    """A jitted function and what it is called with, arrays as shapes.

    Attributes:
        function: made by `jax.jit`.
        args, kwargs: of a call.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def trace(self) -> Any:
        """The program before it is lowered."""
        return self.function.trace(*self.args, **self.kwargs)

    def placed(self, where: jax.sharding.Sharding) -> Self:
        """The same with all arrays on a device that need not be there."""

        def put(x: Any) -> Any:
            if not isinstance(x, jax.ShapeDtypeStruct):
                return x  # what the program is made for: no array
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

        return self._replace(args=jax.tree.map(put, self.args))


def abstract_model(config: DecoderConfig, dtype: Any) -> Decoder:
    """A decoder whose weights are shapes."""
    return nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))


def prefill_program(
    model: Decoder, batch: int, tokens: int, c: Compression, room: int
) -> Program:
    """What `prefill` runs, over a whole prompt or (`every_chunk`) a chunk of it.

    Args:
        model: its arrays may be shapes.
        batch: rows.
        tokens: of the longest prompt.
        c: what is done to the cache.
        room: later tokens that must fit.
    """
    graph, params = nnx.split(model)
    shape = jax.ShapeDtypeStruct
    prompt = shape((batch, bucket(tokens, PROMPT)), jnp.int32)
    lengths = shape((batch,), jnp.int32)
    room = min(room, model.config.max_positions)
    arrays = (jax.tree.map(_bare, params), prompt, lengths)
    if c.schedule.chunk is None:
        how = (c, room, bucket(tokens))
        return Program(inference._prefill, (graph, *arrays, *how), {})
    chunking, state = _in_chunks(model, batch, tokens, c, room)
    chunk = shape((batch, chunking.size), jnp.int32)
    rest = (_front(chunking), chunk, shape((), jnp.int32), chunking)
    return Program(chunked_prefill._read, (graph, arrays[0], *state, *rest), {})


def between_chunks(
    model: Decoder, batch: int, tokens: int, c: Compression, room: int
) -> tuple[Any, Any]:
    """What is held from chunk to chunk of a prompt, as shapes.

    Returns:
        What becomes the cache as it is in the end, and what one is made of.
    """
    chunking, state = _in_chunks(model, batch, tokens, c, room)
    grown, rest = chunked_prefill.parted(state, chunking)
    return grown, rest.groups


def _in_chunks(
    model: Decoder, batch: int, tokens: int, c: Compression, room: int
) -> tuple[Chunking, Any]:
    """How a prompt is read in chunks, and what is handed on between them, as shapes."""
    wide = bucket(tokens, PROMPT)
    dtype = jnp.dtype(model.embedding.get_value().dtype)
    how = {"longest": bucket(tokens), "room": room}
    chunking = Chunking.of_prompt(c, model.config.layers, wide, dtype, **how)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)

    def first(lengths: Any) -> Any:
        return chunked_prefill._start(model.config, lengths, jnp.int32(0), chunking)

    return chunking, jax.eval_shape(first, lengths)


def _front(chunking: Chunking) -> Any:
    """Nothing is in front of the prompt."""
    return ((),) * len(chunking.groups)


def decode_program(model: Decoder, logits: Any, cache: KVCache, room: int) -> Program:
    """The loop that `generate` runs behind a prompt; the cache's memory is its own.

    Args:
        model: its arrays may be shapes.
        logits: of the prompt, as shapes.
        cache: of the prompt, as shapes.
        room: tokens to make.
    """
    graph, params = nnx.split(model)

    def first(logits, lengths):
        key, stops = jax.random.key(0), jnp.full((generation.STOPS,), -1, jnp.int32)
        return generation._first(logits, lengths, key, stops, 0, Sampling(), room)

    state = jax.eval_shape(first, logits, cache.length)
    ends = tuple(jax.ShapeDtypeStruct(s, jnp.int32) for s in ((), (generation.STOPS,)))
    args = (graph, jax.tree.map(_bare, params), *cache.apart, state, *ends)
    return Program(generation._decode_donating, args, {"sampling": Sampling()})


def left_by_prefill(
    model: Decoder, batch: int, tokens: int, c: Compression, room: int
) -> tuple[Any, KVCache]:
    """Logits and cache that `prefill` leaves, as shapes; arguments as of the program.

    The prompt's attention over itself is left out, which takes most of the time of
    tracing: what is held does not depend on how it is computed.
    """
    if c.schedule.chunk is None:
        blind = dataclasses.replace(c, prefill=_Unseen())
        program = prefill_program(model, batch, tokens, blind, room)
    else:
        program = closing_program(model, batch, tokens, c, room)
    logits, cache = jax.tree.map(_bare, program.trace().out_info)
    # Of the tokens, which `prefill` adds.
    digest = jax.ShapeDtypeStruct((batch, 4), jnp.uint32)
    return logits, dataclasses.replace(cache, digest=digest)


def closing_program(
    model: Decoder, batch: int, tokens: int, c: Compression, room: int
) -> Program:
    """What `prefill` runs behind the last chunk."""
    chunking, state = _in_chunks(model, batch, tokens, c, room)
    graph, params = nnx.split(model)
    given = (*chunked_prefill.parted(state, chunking), state.last)
    how = (jax.ShapeDtypeStruct((), jnp.int32), chunking, bucket(tokens), room)
    args = (graph, jax.tree.map(_bare, params), *given, *how)
    return Program(chunked_prefill._closed, args, {})


def _bare(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Unseen(AbstractPrefill):
    """Zeros of the shape that attention has."""

    def attend(self, inputs, lengths, mass, past=None):
        del lengths, past
        b, h, t, d = inputs.q.shape
        out = jnp.zeros((b, h, t, d), jnp.float32)
        return out, jnp.zeros((b, h, t), jnp.float32) if mass else None
