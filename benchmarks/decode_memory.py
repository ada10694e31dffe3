"""Temporaries of the compiled decode loop, and whether the cache is updated in place.

Compiles only: nothing is allocated, so any size runs anywhere.
"""

import functools
import sys

import jax
import jax.numpy as jnp
from common import arguments, large, report
from flax import nnx

import kvjax
from kvjax.models import Decoder, generation, inference
from kvjax.models.sampling import Sampling
from kvjax.types import nbytes

METHODS = ["none", "snapkv", "kivi_4bit", "adakv_snapkv", "quest", "int8"]


def measure(config, name: str, batch: int, length: int, room: int) -> dict:
    c, shape = kvjax.compression(name), jax.ShapeDtypeStruct
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model)
    tokens, lengths = shape((batch, length), jnp.int32), shape((batch,), jnp.int32)
    read = functools.partial(inference._prefill, graph, c=c, room=room)
    logits, layers = jax.eval_shape(read, params, tokens, lengths)

    def first(logits, lengths):
        key, stops = jax.random.key(0), jnp.full((4,), -1, jnp.int32)
        return generation._first(logits, lengths, key, stops, 0, Sampling(), room)

    state = jax.eval_shape(first, logits, lengths)
    rest = (shape((), jnp.int32), shape((4,), jnp.int32))
    lowered = generation._decode_donating.lower(
        graph, params, layers, state, *rest, sampling=Sampling()
    )
    memory = lowered.compile().memory_analysis()
    assert memory is not None  # every backend we compile for has it
    held = nbytes(layers)
    return {
        "cache_bytes": held,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_share": round(memory.temp_size_in_bytes / held, 4),
        "alias_share": round(memory.alias_size_in_bytes / held, 4),
    }


def main() -> int:
    args = arguments(
        __doc__,
        methods=[*METHODS, "lowrank_keys"],
        layers=12,
        batch=1,
        length=16384,
        room=64,
    )
    config = large(args.layers)
    sizes = (args.batch, args.length, args.room)
    results = {name: measure(config, name, *sizes) for name in args.methods}
    return report("decode_memory", vars(args), results)


if __name__ == "__main__":
    sys.exit(main())
