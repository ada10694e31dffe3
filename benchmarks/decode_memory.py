"""Temporaries of the compiled decode loop, and whether the cache is updated in place.

Compiles only: nothing is allocated, so any size runs anywhere; with `--device v5e`, in
an interpreter that has its compiler, for that chip and in bfloat16. A CPU's products
read no slice of a larger array: there one layer's weights are copied at a time, and
counted apart.
"""

import functools
import os
import sys

from kvjax.pallas_kernels.targets import TARGETS

if "--device" in sys.argv:  # has to be known before JAX is imported
    os.environ.update(TARGETS[sys.argv[sys.argv.index("--device") + 1]].environment)

import jax
import jax.numpy as jnp
from common import arguments, large, report
from flax import nnx

import kvjax
from kvjax.models import Decoder, generation, inference
from kvjax.models.sampling import Sampling
from kvjax.types import nbytes

METHODS = ["none", "snapkv", "kivi_4bit", "adakv_snapkv", "quest", "int8"]


def measure(config, name: str, batch: int, length: int, room: int, device: str) -> dict:
    c, shape = kvjax.compression(name), jax.ShapeDtypeStruct
    dtype = jnp.bfloat16 if device else jnp.float32
    model = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model)
    tokens, lengths = shape((batch, length), jnp.int32), shape((batch,), jnp.int32)
    read = functools.partial(inference._prefill, graph, c=c, room=room)
    logits, cache = jax.eval_shape(read, params, tokens, lengths)

    def first(logits, lengths):
        key, stops = jax.random.key(0), jnp.full((4,), -1, jnp.int32)
        return generation._first(logits, lengths, key, stops, 0, Sampling(), room)

    state = jax.eval_shape(first, logits, lengths)
    rest = (shape((), jnp.int32), shape((4,), jnp.int32))
    arguments = located((params, *cache.apart, state, *rest), device)
    traced = generation._decode_donating.trace(graph, *arguments, sampling=Sampling())
    family = TARGETS[device].family if device else "cpu"
    memory = traced.lower(lowering_platforms=(family,)).compile().memory_analysis()
    assert memory is not None  # every backend we compile for has it
    held, temporaries = nbytes(cache), memory.temp_size_in_bytes
    layer = nbytes(nnx.state(model.layers)) // config.num_layers
    return {
        "cache_bytes": held,
        "layer_bytes": layer,
        "temp_bytes": temporaries,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_share": round(temporaries / held, 4),
        "temp_share_but_weights": round(max(0, temporaries - layer) / held, 4),
        "alias_share": round(memory.alias_size_in_bytes / held, 4),
    }


def located(tree, device: str):
    """Shapes on one device of a chip that is not here; as they are without one."""
    if not device:
        return tree
    from jax.experimental import topologies

    chips = topologies.get_topology_desc(**TARGETS[device].topology).devices
    where = jax.sharding.SingleDeviceSharding(chips[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree
    )


def main() -> int:
    args = arguments(
        __doc__,
        name="decode_memory",
        methods=[*METHODS, "lowrank_keys"],
        layers=12,
        batch=1,
        length=16384,
        room=64,
        device="",
    )
    config = large(args.layers)
    sizes = (args.batch, args.length, args.room, args.device)
    results = {name: measure(config, name, *sizes) for name in args.methods}
    return report(args.name, vars(args), results)


if __name__ == "__main__":
    sys.exit(main())
