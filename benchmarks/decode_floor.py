"""A decode step on a CPU beside the time that reading what it needs takes.

The shape of SmolLM2-135M with random float32 weights, and the bundled tiny model. The
floor is all weights (the embedding is the head, too) and the whole cache at the rate at
which this machine sums one large array, measured in the same run.
"""

import sys

import jax.numpy as jnp
import numpy as np
from common import HERE, arguments, decode_ms, median_s, random_model, report

import kvjax
from kvjax.models import Decoder, DecoderConfig
from kvjax.rope import Rope
from kvjax.types import nbytes

SMOL = DecoderConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rope=Rope(head_dim=64, theta=1e5),
    max_positions=8192,
    tie_embeddings=True,
)


def model_of(name: str) -> Decoder:
    if name == "smol":
        return random_model(SMOL)
    return kvjax.load(HERE.parent / "configs/model/kvjax-tiny", dtype="float32")[0]


def main() -> int:
    args = arguments(
        __doc__,
        name="decode_floor",
        models=["smol", "tiny"],
        methods=["none", "snapkv", "kivi_4bit"],
        batches=[1, 8],
        length=512,
        tokens=64,
        repeats=7,
    )
    large = jnp.ones((2**27,), jnp.float32)
    rate = large.nbytes / median_s(lambda: jnp.sum(large), args.repeats)
    del large
    results = [{"read_gb_s": rate / 1e9}]
    for name in args.models:
        model = model_of(name)
        for batch in args.batches:
            shape = (batch, args.length)
            draw = np.random.default_rng(0)
            prompt = draw.integers(3, 100, shape, dtype=np.int32)
            for method in args.methods:
                c = kvjax.compression(method)
                room = {"max_new_tokens": args.tokens}
                _, cache = kvjax.prefill(model, prompt, None, c, **room)
                ms = decode_ms(model, cache, args.tokens, args.repeats)
                floor = 1e3 * (nbytes(model) + cache.nbytes) / rate
                row = {"model": name, "batch": batch, "compression": method}
                row |= {"ms_per_token": ms, "floor_ms": floor, "of_floor": floor / ms}
                print(row, file=sys.stderr, flush=True)
                results.append(row)
    return report(args.name, vars(args), results)


if __name__ == "__main__":
    sys.exit(main())
