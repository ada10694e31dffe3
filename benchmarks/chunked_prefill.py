"""Prefill in chunks: memory of its programs by length, and time against one pass.

Memory is compiled, not measured: of the program of a chunk and of the one that closes,
the most that arguments, results and temporaries take together, weights not counted.
"""

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import arguments, large, median_s, random_model, report
from flax import nnx

import kvjax
from kvjax.compress.config import Compression
from kvjax.models import Decoder, chunked_prefill, inference
from kvjax.models.chunked import Chunking
from kvjax.types import nbytes

LONG = 16384
"""Tokens beyond which a prompt is read in chunks alone, under a budget, once."""


def at_its_peak(compiled: Any, given: int) -> int:
    """Bytes of a program's results and temporaries beside `given` ones of arguments."""
    memory = compiled.memory_analysis()
    assert memory is not None  # every backend we compile for has it
    made = memory.output_size_in_bytes + memory.temp_size_in_bytes
    return given + made - memory.alias_size_in_bytes


def in_chunks(config, c: Compression, length: int, room: int) -> dict[str, int]:
    """Bytes of what is held, of the program of a chunk and of the last one."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model)
    lengths, before = jax.ShapeDtypeStruct((1,), jnp.int32), jnp.int32(0)
    chunking = Chunking.of_prompt(c, config.layers, length, jnp.float32, room=room)
    how = {"chunking": chunking}
    first = functools.partial(chunked_prefill._first, config, before=before, **how)
    state = jax.eval_shape(first, lengths)
    front = ((),) * len(chunking.groups)
    chunk = jax.ShapeDtypeStruct((1, c.schedule.chunk), jnp.int32)
    read = chunked_prefill._read.lower(
        graph, params, *state, front, chunk, before, chunking
    )
    close = chunked_prefill._closed.lower(
        graph,
        params,
        *chunked_prefill.parted(state, chunking),
        state.last,
        before,
        chunking,
        length,
        room,
    )
    held = nbytes(state)
    return {
        "held": held,
        "chunk": at_its_peak(read.compile(), held),
        "close": at_its_peak(close.compile(), held),
    }


def at_once(config, c: Compression, length: int, room: int) -> int:
    """Bytes of the program that reads a whole prompt."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    how = {"c": c, "room": room, "longest": length}
    read = inference._prefill.lower(graph, params, tokens, lengths, **how)
    return at_its_peak(read.compile(), nbytes(tokens))


def read(model: Decoder, length: int, room: int, c: Compression) -> Any:
    """One prompt of made-up tokens."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, model.config.vocab_size, (1, length), dtype=np.int32)
    return kvjax.prefill(model, tokens, None, c, max_new_tokens=room)


def compression(name: str, slots: int, **schedule: Any) -> Compression:
    """A preset with a budget in slots, where it has one."""
    drops = kvjax.compression(name).evict is not None
    fields = {"evict.budget.slots": slots} if drops else {}
    return kvjax.compression(name, **fields, **schedule)


def main() -> int:
    args = arguments(
        __doc__,
        methods=["snapkv", "adakv_snapkv", "none", "kivi_4bit"],
        lengths=[8192, 32768, 131072],
        timed=[8192, 131072],
        slots=2048,
        size=1024,
        layers=4,
        room=64,
    )
    longest = max(*args.lengths, *args.timed) + args.room
    config = dataclasses.replace(large(args.layers, 8192), max_positions=longest)
    model = random_model(config)
    schedule = {"type": "every_chunk", "size": args.size}
    results: dict[str, Any] = {}
    for name in args.methods:
        whole = compression(name, args.slots)
        c = compression(name, args.slots, schedule=schedule)
        row: dict[str, Any] = {"bytes": {}, "bytes_at_once": {}, "s": {}, "s_whole": {}}
        for length in args.lengths:
            row["bytes"][length] = in_chunks(config, c, length, args.room)
            row["bytes_at_once"][length] = at_once(config, whole, length, args.room)
        for length in args.timed:
            short = length <= LONG
            if not short and whole.evict is None:
                continue  # which grows with the square of it, hours of it
            run = functools.partial(read, model, length, args.room)
            took = median_s(functools.partial(run, c), 3 if short else 1)
            row["s"][length] = round(took, 3)
            if short:
                took = median_s(functools.partial(run, whole), 3)
                row["s_whole"][length] = round(took, 3)
        results[name] = row
    return report("chunked_prefill", vars(args), results)


if __name__ == "__main__":
    sys.exit(main())
