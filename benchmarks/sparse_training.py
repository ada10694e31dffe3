"""Forward and backward pass of training under a sparse prefill against a dense one.

The same weights, tokens and compression point. The pattern is the last diagonals and
some columns, so that how much it leaves out does not depend on the random weights.
"""

import functools
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from common import arguments, large, random_model, report
from flax import nnx

import kvjax
from kvjax.compress.config import Compression
from kvjax.models import Decoder, DecoderConfig
from kvjax.models.simulate import simulated

LATER = 256
"""Tokens behind the compression point: they attend to all before them."""


def program(config: DecoderConfig, c: Compression, length: int, remat: bool):
    """The compiled pass: `(params, tokens) -> (loss, gradient)`."""
    shape = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(shape)
    point = jnp.full((1,), length - LATER, jnp.int32)

    @jax.jit
    @jax.value_and_grad
    def run(params, tokens):
        positions = jnp.arange(length)[None]
        model = nnx.merge(graph, params)
        attention = simulated(model, point, tokens, c, LATER)
        hidden = model(tokens, positions, attention, trained=True, remat=remat)
        return jnp.mean(jnp.square(hidden))

    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return run.lower(params, tokens).compile()


def temporaries(compiled) -> int:
    """Bytes beside arguments and results."""
    memory = compiled.memory_analysis()
    assert memory is not None  # every backend we compile for has it
    return memory.temp_size_in_bytes


def computed(length: int, args) -> float:
    """Products of a query and a key that the pattern computes, as a share of dense."""
    blocks = length // args.block
    kept = min(blocks, -(-(args.local - 1) // args.block) + 1)
    near = sum(blocks - offset for offset in range(kept)) * args.block**2
    far = (length - kept * args.block) * args.vertical
    return (near + far) / (length * (length + args.block) / 2)


def main() -> int:
    args = arguments(
        __doc__,
        length=8192,
        lengths=[4096, 8192],
        layers=1,
        vertical=256,
        local=256,
        block=128,
        repeats=3,
    )
    sizes = {"vertical": args.vertical, "local": args.local, "block": args.block}
    fields = {**sizes, "slash": args.local, "first": 0, "dense_below": 0}
    how = {
        "dense": kvjax.compression("none"),
        "sparse": kvjax.compression(
            "vertical_slash", **{f"prefill.{k}": v for k, v in fields.items()}
        ),
    }
    config = large(args.layers, vocab=8192)
    compiled = functools.cache(
        lambda name, length, remat: program(config, how[name], length, remat)
    )
    params = nnx.state(random_model(config))
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, config.vocab_size, (1, args.length), dtype=np.int32)
    times: dict[str, list[float]] = {name: [] for name in how}
    for _ in range(args.repeats + 1):  # in turns: a busy machine is busy for both
        for name, taken in times.items():
            run = compiled(name, args.length, False)
            start = time.perf_counter()
            jax.block_until_ready(run(params, jnp.asarray(tokens)))
            taken.append(1e3 * (time.perf_counter() - start))
    ms = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    results = {
        "ms": ms,
        "sparse_over_dense": ms["sparse"] / ms["dense"],
        "computed_share": computed(args.length, args),
        "temp_bytes": {
            f"{name}{'-remat' if remat else ''}@{length}": temporaries(
                compiled(name, length, remat)
            )
            for name in how
            for remat in (False, True)
            for length in args.lengths
        },
    }
    return report("sparse_training", vars(args), results)


if __name__ == "__main__":
    sys.exit(main())
