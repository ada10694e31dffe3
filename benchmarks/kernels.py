"""The ops against what they replace, in one run; aims beside each figure.

On a CPU: the XLA paths against dense attention. On a GPU: the kernels against the copy
bandwidth of the same run, cuDNN (through JAX) and torch's SDPA. What the attached
device cannot run is "not measured". Writes `results/kernels_<chip>.json`.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import HERE, arguments, median_s, report

from kvjax.pallas_kernels.column_stats import column_stats
from kvjax.pallas_kernels.decode_attention import decode_attention
from kvjax.pallas_kernels.dense import causal_attention
from kvjax.pallas_kernels.quantize_pack import quantize_pack
from kvjax.pallas_kernels.sparse_prefill import sparse_prefill
from kvjax.pallas_kernels.sparse_prefill.patterns import BlockList

NOT_MEASURED = {"not measured": "no such device at hand"}
BLOCK, WINDOW = 128, 64


def normal(seed: int, *shape: int, dtype: Any) -> jax.Array:
    """A random array, made where it is used."""
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def seconds(call: Callable[..., Any], *args: Any, repeats: int, calls: int = 1):
    """Median seconds per call; `calls` of them are in flight at once.

    On a GPU one short kernel is faster than its launch: several hide that.
    """
    run = jax.jit(call)
    return median_s(lambda: [run(*args) for _ in range(calls)], repeats) / calls


def result(value: float, aim: str, met: bool, **more: Any) -> dict[str, Any]:
    """A figure, what was aimed at, and whether it was met."""
    return {"value": round(value, 4), "aim": aim, "met": met, **more}


def causal_list(heads: int, tokens: int, density: float) -> BlockList:
    """Random KV blocks per query block, `density` of what it may see, its own too."""
    draw, rows = np.random.default_rng(0), tokens // BLOCK
    counts = np.maximum(1, np.round(density * (1 + np.arange(rows)))).astype(np.int32)
    index = np.zeros((heads, rows, counts[-1]), np.int32)
    for row, count in enumerate(counts):
        for head in range(heads):
            others = draw.choice(row, count - 1, replace=False) if row else []
            index[head, row, :count] = [*sorted(others), row]
    counts = np.broadcast_to(counts, (1, heads, rows))
    return BlockList(
        index=jnp.asarray(index)[None],
        counts=jnp.asarray(counts),
        block_q=BLOCK,
        block_k=BLOCK,
    )


# CPU: the XLA paths.


def ragged_decode(a: Any) -> dict[str, Any]:
    """Heads that kept a tenth of the slots, in one flat buffer, against all slots."""
    shape = (1, a.kv_heads, a.decode_length, a.head_dim)
    keys, values = (normal(i, *shape, dtype=jnp.float32) for i in (1, 2))
    q = normal(0, 1, a.heads, 1, a.head_dim, dtype=jnp.float32)
    lengths = jnp.full((1, a.kv_heads), a.decode_length, jnp.int32)
    how = {"scale": a.head_dim**-0.5, "backend": "xla"}
    dense = seconds(
        lambda *x: decode_attention(*x, **how),
        q,
        keys,
        values,
        lengths,
        repeats=a.repeats,
    )
    # Budgets differ per head and sum to a tenth.
    share = np.linspace(0.5, 1.5, a.kv_heads)
    kept = np.round(0.1 * a.decode_length * share / share.mean()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(kept)]).astype(np.int32)
    flat = [x.reshape(1, -1, a.head_dim)[:, : offsets[-1]] for x in (keys, values)]
    ragged = seconds(
        lambda q, k, v, n, o: decode_attention(q, k, v, n, offsets=o, **how),
        q,
        *flat,
        jnp.asarray(kept)[None],
        jnp.asarray(offsets)[None],
        repeats=a.repeats,
    )
    ratio = ragged / dense
    times = {"dense_ms": round(1e3 * dense, 3), "ragged_ms": round(1e3 * ragged, 3)}
    return result(ratio, "<= 0.2 of dense", ratio <= 0.2, **times)


def dense_prefill(a: Any) -> tuple[float, tuple[jax.Array, ...]]:
    """Seconds of dense causal attention, and its arguments."""
    n, d = a.prefill_length, a.head_dim
    q = normal(0, 1, a.heads, n, d, dtype=jnp.float32)
    k, v = (normal(i, 1, a.kv_heads, n, d, dtype=jnp.float32) for i in (1, 2))
    at = jnp.arange(n, dtype=jnp.int32)[None]

    def dense(q, k, v, at):
        return causal_attention(q, k, v, at, at, scale=d**-0.5)

    return seconds(dense, q, k, v, at, repeats=a.repeats), (q, k, v, at)


def prefill(a: Any) -> dict[str, Any]:
    """Block-sparse prefill, and the statistics of its last queries, against dense."""
    dense, (q, k, v, at) = dense_prefill(a)
    scale = a.head_dim**-0.5

    def sparse(q, k, v, pattern):
        return sparse_prefill(q, k, v, pattern, scale=scale, backend="xla")

    def stats(q, k, at):
        last = (q[:, :, -WINDOW:], k, at[:, -WINDOW:], at)
        return column_stats(*last, scale=scale)

    pattern = causal_list(a.heads, a.prefill_length, 0.1)
    took = seconds(sparse, q, k, v, pattern, repeats=a.repeats)
    voted = seconds(stats, q, k, at, repeats=a.repeats)
    dense_ms = round(1e3 * dense, 1)
    return {
        "block_sparse_prefill": result(
            took / dense,
            "<= 0.25 of dense",
            took <= 0.25 * dense,
            dense_ms=dense_ms,
            sparse_ms=round(1e3 * took, 1),
        ),
        "column_stats": result(
            voted / dense,
            "<= 0.1 of dense",
            voted <= 0.1 * dense,
            dense_ms=dense_ms,
            stats_ms=round(1e3 * voted, 1),
        ),
    }


# GPU: the kernels.


def bandwidth(repeats: int, size: int = 1 << 30) -> float:
    """Bytes read and written per second by a copy, of 4 GiB by default."""
    x = jnp.zeros((size,), jnp.float32)
    return 2 * x.nbytes / seconds(lambda x: x + 1, x, repeats=repeats, calls=4)


def matrix_rate(repeats: int, size: int = 8192) -> float:
    """Operations per second of a square bfloat16 product of random numbers."""
    x, y = (normal(i, size, size, dtype=jnp.bfloat16) for i in (0, 1))
    return 2 * size**3 / seconds(jnp.matmul, x, y, repeats=repeats, calls=10)


def attempt(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A result, or why there is none: one kernel must not cost the others' figures."""
    try:
        return call()
    except Exception as wrong:  # whatever a compiler or a device raises
        text = (str(wrong).strip().splitlines() or [""])[0][:300]
        return {"error": f"{type(wrong).__name__}: {text}"}


def gpu_decode(a: Any, copy: float) -> dict[str, Any]:
    """Decode at long context: bf16 against the copy, codes against bf16."""
    b, k, s, d = a.batch, 8, a.length, 128
    q = normal(0, b, 32, 1, d, dtype=jnp.bfloat16)
    lengths = jnp.full((b, k), s, jnp.int32)
    keys, values = (normal(i, b, k, s, d, dtype=jnp.bfloat16) for i in (1, 2))
    live = jnp.ones((b, k, s), bool)

    def step(*x):
        return decode_attention(*x, scale=d**-0.5, backend=a.kernel)

    def timed(keys, values):
        args = (q, keys, values, lengths)
        return seconds(step, *args, repeats=a.repeats, calls=20)

    plain = timed(keys, values)
    moved = keys.nbytes + values.nbytes
    share = moved / plain / copy
    out = {
        "bf16": result(
            share,
            ">= 0.85 of the copy bandwidth",
            share >= 0.85,
            ms=round(1e3 * plain, 4),
            gb_s=round(moved / plain / 1e9, 1),
        )
    }
    for bits, aim in ((8, None), (4, 3.0), (2, 4.5)):

        def packed(bits=bits, aim=aim):
            codes = [
                quantize_pack(x, live, bits=bits, axis=axis, group=32, backend="xla")
                for x, axis in ((keys, "channel"), (values, "token"))
            ]
            gain = plain / (took := timed(*codes))
            goal = f">= {aim} x bf16" if aim else "none"
            return result(gain, goal, gain >= (aim or 0), ms=round(1e3 * took, 4))

        out[f"int{bits}"] = attempt(packed)
    return out


def gpu_prefill(a: Any) -> dict[str, Any]:
    """Sparse prefill and column statistics against cuDNN's dense attention."""
    n, d = a.length, 128
    q = normal(0, 1, 32, n, d, dtype=jnp.bfloat16)
    k, v = (normal(i, 1, 8, n, d, dtype=jnp.bfloat16) for i in (1, 2))
    rows = [x.swapaxes(1, 2) for x in (q, k, v)]  # its layout, out of the timing

    def cudnn(*x):
        how = {"is_causal": True, "implementation": a.dense}
        return jax.nn.dot_product_attention(*x, **how)

    dense = seconds(cudnn, *rows, repeats=a.repeats)
    at = jnp.arange(n, dtype=jnp.int32)[None]

    def sparse():
        pattern = causal_list(32, n, 0.1)

        def run(q, k, v, pattern):
            return sparse_prefill(q, k, v, pattern, scale=d**-0.5, backend=a.kernel)

        took = seconds(run, q, k, v, pattern, repeats=a.repeats)
        gain = dense / took
        return result(gain, ">= 6 x cuDNN dense", gain >= 6, ms=round(1e3 * took, 2))

    def stats():
        def run(q, k, at):
            last = (q[:, :, -WINDOW:], k, at[:, -WINDOW:], at)
            return column_stats(*last, scale=d**-0.5)

        took = seconds(run, q, k, at, repeats=a.repeats, calls=5)
        more = took / dense
        goal = "<= 0.03 of a dense prefill"
        return result(more, goal, more <= 0.03, ms=round(1e3 * took, 3))

    out = {"cudnn_ms": round(1e3 * dense, 2), "sparse_10_percent": attempt(sparse)}
    return {**out, "column_stats": attempt(stats)}


def torch_side(a: Any) -> dict[str, Any]:
    """Torch's SDPA at the same sizes, in an interpreter that has torch."""
    python = os.environ.get("KVJAX_TORCH_PYTHON") or sys.executable
    sizes = (str(a.batch), str(a.length), str(a.repeats))
    command = [python, str(HERE / "torch_kernels.py"), *sizes]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"not measured": done.stderr.strip().splitlines()[-1:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> int:
    a = arguments(
        __doc__,
        decode_length=32768,
        prefill_length=16384,
        heads=8,
        kv_heads=2,
        head_dim=64,
        batch=8,
        length=131072,
        repeats=5,
        kernel="gpu",
        dense="cudnn",
    )
    start = time.perf_counter()
    device = jax.devices()[0]
    results: dict[str, Any] = {"cpu": NOT_MEASURED, "gpu": NOT_MEASURED}
    if device.platform == "cpu":
        results["cpu"] = {"ragged_decode": ragged_decode(a), **prefill(a)}
    elif device.platform == "gpu":
        copy = bandwidth(a.repeats)
        results["gpu"] = {
            "copy_gb_s": round(copy / 1e9, 1),
            "decode": attempt(lambda: gpu_decode(a, copy)),
            "prefill": attempt(lambda: gpu_prefill(a)),
            "torch": torch_side(a),
        }
    results["seconds"] = round(time.perf_counter() - start, 1)
    chip = re.sub(r"[^a-z0-9]+", "_", device.device_kind.lower()).strip("_")
    return report(f"kernels_{chip}", vars(a), results)


if __name__ == "__main__":
    sys.exit(main())
