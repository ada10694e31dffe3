"""Sparse patterns of prefill against dense attention: time, share of pairs, mass kept.

One attention layer over made-up tokens, patterns as their presets have them, choice
included. `--quick 1` takes short prompts and small patterns: whether it runs.
"""

import dataclasses
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import arguments, report

import kvjax
from kvjax.config import shortened
from kvjax.models.calibration import measured
from kvjax.prefills import AbstractPattern, Dense
from kvjax.rope import Rope
from kvjax.types import LayerInputs, LayerSpec, padded_positions

NEAR = 400.0
"""Tokens over which what a token is about changes."""


def tokens_of(length: int, spec: LayerSpec, seed: int = 0) -> LayerInputs:
    """Attention with a sink, a few tokens that all look for, and topics that drift.

    Which blocks a threshold keeps follows from this: random tokens would need all.
    """
    draw = np.random.default_rng(seed)
    heads, kv_heads, d = spec.num_heads, spec.num_kv_heads, spec.head_dim

    def noise(*shape: int) -> np.ndarray:
        return draw.standard_normal((1, *shape, d)).astype(np.float32)

    stay = np.exp(-1 / NEAR)
    topic = noise(kv_heads, length)
    for t in range(1, length):  # of unit variance at any time
        topic[:, :, t] *= np.sqrt(1 - stay**2)
        topic[:, :, t] += stay * topic[:, :, t - 1]
    wanted = noise(kv_heads, 1)
    k = topic + 0.7 * noise(kv_heads, length)
    loud = draw.random((1, kv_heads, length, 1)) < 0.002
    k += wanted * loud
    k[:, :, :4] = 1.1 * wanted
    groups = heads // kv_heads
    q = np.repeat(topic + wanted, groups, axis=1)
    q += 0.7 * noise(heads, length)
    lengths = jnp.asarray([length], jnp.int32)
    return LayerInputs(
        q=jnp.asarray(q),
        k=jnp.asarray(k),
        v=jnp.asarray(noise(kv_heads, length)),
        positions=padded_positions(lengths, length),
        o_proj=jnp.zeros((heads, d, 1)),
        spec=spec,
    )


def patterns(names: list[str], quick: bool) -> dict[str, AbstractPattern]:
    """The patterns of presets, whatever the length."""
    found: dict[str, Any] = {name: kvjax.compression(name).prefill for name in names}
    found = {n: shortened(p) if quick else p for n, p in found.items()}
    return {n: dataclasses.replace(p, dense_below=0) for n, p in found.items()}


def measure(length: int, spec: LayerSpec, some: dict[str, Any], repeats: int):
    """Of each pattern at one length."""
    inputs, lengths = tokens_of(length, spec), jnp.asarray([length], jnp.int32)
    every = {"dense": Dense(), **some}
    runs = {
        name: jax.jit(lambda x, n, p=p: p.attend(x, n, False)[0])
        for name, p in every.items()
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):  # in turns: a busy machine is busy for all
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(inputs, lengths))
            times[name].append(1e3 * (time.perf_counter() - start))
    ms = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    look = jax.jit(lambda x, n: measured(x, n, list(every.values()))[1:])
    kept, share = (np.asarray(x).mean(axis=1) for x in look(inputs, lengths))
    return {
        name: {
            "ms": round(ms[name], 1),
            "of_dense": round(ms[name] / ms["dense"], 3),
            "share": round(float(share[place]), 4),
            "mass_kept": round(float(kept[place]), 4),
        }
        for place, name in enumerate(every)
    }


def main() -> int:
    args = arguments(
        __doc__,
        names=[
            "a_shape",
            "tri_shape",
            "block_topk",
            "vertical_slash",
            "flex_prefill",
            "xattention",
        ],
        lengths=[1024, 2048, 4096, 8192, 16384, 32768],
        heads=4,
        kv_heads=2,
        head_dim=64,
        repeats=2,
        quick=0,
    )
    spec = LayerSpec(
        num_layers=1,
        num_heads=args.heads,
        num_kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        scale=args.head_dim**-0.5,
        rope=Rope(head_dim=args.head_dim),
    )
    if args.quick:
        args.lengths, args.repeats = [256, 512], 1
    some = patterns(args.names, bool(args.quick))
    results = {n: measure(n, spec, some, args.repeats) for n in args.lengths}
    name = "sparse_prefill_quick" if args.quick else "sparse_prefill"
    return report(name, vars(args), results)


if __name__ == "__main__":
    sys.exit(main())
