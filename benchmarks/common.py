"""What the benchmarks share: models, synthetic caches, timing, and the record."""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kvjax.cache import KVCache
from kvjax.compress.building import Building
from kvjax.compress.config import Compression
from kvjax.compress.observe import observe
from kvjax.depth import Depth, members, over
from kvjax.models import Decoder, DecoderConfig, generation, origins
from kvjax.models.inference import nameless
from kvjax.models.prompts import settled
from kvjax.models.sampling import Sampling
from kvjax.rope import Rope
from kvjax.types import LayerInputs, padded_positions

HERE = pathlib.Path(__file__).resolve().parent


def arguments(doc: str | None, **defaults: Any) -> argparse.Namespace:
    """Command line with `--name` for every default; a list takes several values."""
    parser = argparse.ArgumentParser(description=doc)
    for name, value in defaults.items():
        many = isinstance(value, list)
        kind = type(value[0] if many else value)
        how: dict[str, Any] = {"type": kind, "default": value}
        parser.add_argument(f"--{name}", **how, nargs="+" if many else None)
    return parser.parse_args()


def large(layers: int = 12, vocab: int = 32000) -> DecoderConfig:
    """A Llama of width 768 with four KV heads for twelve query heads."""
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=768,
        intermediate_size=2048,
        num_layers=layers,
        num_heads=12,
        num_kv_heads=4,
        head_dim=64,
        rope=Rope(head_dim=64),
        max_positions=65536,
        tie_embeddings=True,
    )


def random_model(config: DecoderConfig, seed: int = 0, dtype=jnp.float32) -> Decoder:
    """Fresh weights."""
    return Decoder(config, dtype=dtype, rngs=nnx.Rngs(seed))


@functools.partial(
    jax.jit, static_argnames=("config", "c", "batch", "length", "room", "dtype")
)
def _random_cache(
    key,
    config: DecoderConfig,
    c: Compression,
    batch: int,
    length: int,
    room: int,
    dtype,
) -> KVCache:
    lengths = jnp.full((batch,), length, jnp.int32)
    specs = config.layers
    building = Building.of(c, specs, lengths, length, room, dtype)
    groups = members(building.loops)

    def one(depth: Depth, state: Any, given: None):
        del given
        first = groups[depth.group].start
        spec, layout = config.layers[first].kind, building.found.layouts[first]
        depth = dataclasses.replace(depth, kind=layout)
        mine = jax.random.split(jax.random.fold_in(key, depth.layer), 3)
        heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        q, k, v = (
            jax.random.normal(one, (batch, n, length, spec.head_dim), dtype)
            for one, n in zip(mine, heads, strict=True)
        )
        o = jnp.zeros((spec.num_heads, spec.head_dim, config.hidden_size), dtype)
        at = padded_positions(lengths, length)
        inputs = LayerInputs(
            q=q, k=k, v=v, positions=at, o_proj=o, depth=depth, spec=spec
        )
        observed = observe(inputs, lengths, layout.plan, None)
        return building.step(depth, state, observed)

    return building.cache(*over(building.loops, one, building.start()))


def random_cache(
    config: DecoderConfig,
    c: Compression,
    batch: int,
    length: int,
    room: int,
    seed: int = 0,
    dtype: Any = jnp.float32,
) -> KVCache:
    """What prefill leaves, for random queries, keys and values instead of a prompt."""
    key = jax.random.key(seed)
    cache = _random_cache(key, config, c, batch, length, room, jnp.dtype(dtype))
    about = origins.provenance(config, jnp.dtype(dtype), c)
    return settled(dataclasses.replace(cache, provenance=about))


def decode_ms(model: Decoder, cache: KVCache, tokens: int, repeats: int = 5) -> float:
    """Median milliseconds per decode step of the loop that `generate` runs."""
    state_of = functools.partial(
        generation._first,
        jnp.zeros((cache.length.shape[0], model.config.vocab_size)),
        cache.length,
        stops=(stops := jnp.full((4,), -1, jnp.int32)),
        pad=0,
        sampling=Sampling(),
        room=tokens,
    )
    graph, params = nnx.split(model)
    limit, times = jnp.asarray(tokens, jnp.int32), []
    for _ in range(repeats + 1):
        state = state_of(key=jax.random.key(0))
        held, front = jax.tree.map(jnp.copy, nameless(cache)).apart
        jax.block_until_ready((held, front))
        start = time.perf_counter()
        out = generation._decode_donating(
            graph, params, held, front, state, limit, stops, sampling=Sampling()
        )
        jax.block_until_ready(out)
        times.append(1e3 * (time.perf_counter() - start) / (tokens - 1))
        del out  # or three caches are held at once
    return statistics.median(times[1:])


def median_s(call: Callable[[], Any], repeats: int) -> float:
    """Median seconds of `call`, the first (compiling) one aside."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def about() -> dict[str, Any]:
    """When, on what, and with which versions something is measured."""
    git = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # a bare machine
        commit = ""
    return {
        "commit": commit or None,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load": loadavg(),
    }


def report(name: str, config: dict[str, Any], results: Any, seed: int = 0) -> int:
    """Print the record and write it to `results/<name>.json`."""
    record: dict[str, Any] = {"benchmark": name, "config": config, "seed": seed}
    record |= {"results": results, **about()}
    target = HERE / "results" / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record))
    sys.stdout.flush()
    return 0


def loadavg() -> float | None:
    """Processes that ran in the last minute; above 1, others ran beside this one."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
