"""Prefill with the statistics of a score against plain prefill; its temporaries."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import arguments, large, median_s, random_model, report
from flax import nnx

import kvjax
from kvjax.models import Decoder, inference


def seconds(model, c, length: int, repeats: int) -> float:
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, model.config.vocab_size, (1, length), dtype=np.int32)
    return median_s(lambda: kvjax.prefill(model, tokens, None, c), repeats)


def temporaries(config, c, length: int) -> int:
    """Bytes beside arguments and results, from the compiled program."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    lowered = inference._prefill.lower(graph, params, tokens, lengths, c=c, room=64)
    memory = lowered.compile().memory_analysis()
    assert memory is not None  # every backend we compile for has it
    return memory.temp_size_in_bytes


def main() -> int:
    args = arguments(
        __doc__,
        methods=["none", "snapkv", "h2o"],
        length=4096,
        lengths=[8192, 16384, 32768],
        layers=4,
        repeats=3,
    )
    config = large(args.layers, vocab=8192)
    model = random_model(config)
    results: dict[str, dict[str, Any]] = {}
    for name in args.methods:
        c = kvjax.compression(name)
        took = seconds(model, c, args.length, args.repeats)
        row: dict[str, Any] = {"prefill_ms": round(1e3 * took, 1)}
        plain = results.get("none", row)
        row["of_plain"] = round(row["prefill_ms"] / plain["prefill_ms"], 3)
        row["temp_bytes"] = {n: temporaries(config, c, n) for n in args.lengths}
        results[name] = row
    return report("prefill_stats", vars(args), results)


if __name__ == "__main__":
    sys.exit(main())
