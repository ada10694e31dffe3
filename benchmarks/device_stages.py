"""What `device.py` measures: the rows of every stage but parity.

Sizes are those of Llama-3.1-8B; the dry form has tiny ones, and the XLA path or an
interpreter in place of GPU kernels.
"""

import argparse
import dataclasses
import functools
import importlib
import itertools
import json
import pathlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import kernels as table
import tune as tuner
from common import decode_ms, large, median_s, random_cache, random_model
from common_floors import floor_s
from common_inputs import filled
from common_train import BOTH, Steps
from decode_memory import METHODS

import kvjax
from kvjax.models import Decoder
from kvjax.models.bundled import shape_of
from kvjax.pallas_kernels.cases import Workload
from kvjax.pallas_kernels.compat import gpu_target
from kvjax.pallas_kernels.parity import arguments, public, served
from kvjax.pallas_kernels.registry import OPS
from kvjax.types import nbytes

Rows = list[tuple[str, Callable[[], dict[str, Any]]]]
"""Name and measurement of each row, in order."""

CHIP = "h200"
"""Whose block sizes are tried around: those of every Hopper GPU so far."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """Where a stage runs.

    Attributes:
        out: folder with the records of the stages before it.
        dry: tiny sizes, on any device.
        first: rows before it are there already.
    """

    out: pathlib.Path
    dry: bool
    first: int = 0

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """Rows of an earlier stage that hold figures."""
        path = self.out / f"{stage}.json"
        if not path.is_file():
            return []
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return [row for row in rows if not {"error", "skipped"} & set(row)]

    @functools.cached_property
    def card(self) -> tuple[float, float]:
        """Bytes per second of a copy, operations per second of a product."""
        known = {row["name"]: row for row in self.rows("card")}
        measure = {name: known.get(name) or call() for name, call in card(self)}
        copy, product = measure["copy"], measure["product"]
        return 1e9 * copy["gb_s"], 1e12 * product["tflop_s"]


def card(context: Context) -> Rows:
    """Copy bandwidth and matrix rate: the floors of everything else."""
    elements, side = (1 << 20, 256) if context.dry else (1 << 30, 8192)

    def copy() -> dict[str, Any]:
        return {"gb_s": round(table.bandwidth(5, elements) / 1e9, 2)}

    def product() -> dict[str, Any]:
        return {"tflop_s": round(table.matrix_rate(5, side) / 1e12, 3)}

    return [("copy", copy), ("product", product)]


# Kernels.


def kernels(context: Context) -> Rows:
    """The table of `kernels.py` with its baselines, then every op against its floor."""
    a = argparse.Namespace(
        batch=1 if context.dry else 8,
        length=512 if context.dry else 131072,
        repeats=2 if context.dry else 5,
        kernel="xla" if context.dry else "gpu",
        dense="xla" if context.dry else "cudnn",
    )
    rows: Rows = [
        ("decode", lambda: table.gpu_decode(a, context.card[0])),
        ("prefill", lambda: table.gpu_prefill(a)),
        ("torch", lambda: table.torch_side(a)),
    ]
    loads = [(op, list(workloads(op, context.dry))) for op in OPS]
    # The first workload of every op before the second of any.
    for op, load in in_turns(loads):
        one = functools.partial(against_floor, op, load, a.kernel, context)
        rows.append((f"{op} {load.name}", one))
    for op, (load, *_) in () if context.dry else loads:
        one = functools.partial(against_floor, op, load, "xla", context)
        rows.append((f"{op} {load.name} by xla", one))
    return rows


def workloads(op: str, dry: bool) -> Iterator[Workload]:
    """Forward workloads of an op; dry: the first of its small cases."""
    if not dry:
        module = importlib.import_module(f"kvjax.pallas_kernels.{op}.cases")
        yield from (load for load in module.WORKLOADS if not load.gradient)
        return
    case = next(case for name, case in served("gpu") if name == op)
    make = functools.partial(arguments, op, case)
    yield Workload(name=case.name, make=make, floor_bytes=nbytes(make()[0]))


def in_turns(lists: list[tuple[str, list[Any]]]) -> Iterator[tuple[str, Any]]:
    """The first of each list, then the second of each, with the names of the lists."""
    for turn in itertools.zip_longest(*(each for _, each in lists)):
        for (name, _), one in zip(lists, turn, strict=True):
            if one is not None:
                yield name, one


def against_floor(
    op: str, load: Workload, backend: str, context: Context
) -> dict[str, Any]:
    """Milliseconds of a workload, and the least that they could be on this card."""
    arrays = functools.partial(filled, public(op), *load.make())
    floor, bound = floor_s(op, load, arrays, *context.card)
    call = tuner.prepared(op, load)(backend=backend)
    # Several in flight hide the launch of a short kernel.
    calls = 20 if floor < 1e-3 else 2
    took = median_s(lambda: [call() for _ in range(calls)], 5) / calls
    return {
        "op": op,
        "workload": load.name,
        "backend": backend,
        "ms": round(1e3 * took, 4),
        "floor_ms": round(1e3 * floor, 4),
        "of_floor": round(floor / took, 4),
        "bound": bound,
    }


# The model.


def decode(context: Context) -> Rows:
    """Time per token of full caches, six presets, the middle length first."""
    dry = context.dry
    config = large(3, 512) if dry else shape_of("meta-llama/Llama-3.1-8B")
    lengths = (256,) if dry else (32768, 131072, 8192)
    tokens = 5 if dry else 33

    @functools.cache
    def model() -> Decoder:
        return random_model(config, dtype=jnp.bfloat16)

    def one(name: str, length: int) -> dict[str, Any]:
        c = kvjax.compression(name)
        sizes = (1, length, tokens)
        cache = random_cache(config, c, *sizes, dtype=jnp.bfloat16)
        ms = decode_ms(model(), cache, tokens, repeats=3)
        # A step reads every weight but the embedding, of which it takes a row.
        weights = nbytes(model()) - model().embedding[...].nbytes
        floor = 1e3 * (weights + cache.nbytes) / context.card[0]
        return {
            "layers": config.num_layers,
            "ms_per_token": round(ms, 3),
            "floor_ms": round(floor, 3),
            "of_floor": round(floor / ms, 4),
            "cache_bytes": cache.nbytes,
            "weight_bytes": weights,
        }

    return [
        (f"{name} {length}", functools.partial(one, name, length))
        for length in lengths
        for name in METHODS
    ]


def train(context: Context) -> Rows:
    """A step: plain, and under simulated eviction and 2-bit codes."""
    c = kvjax.compression("snapkv_kivi", **BOTH)
    repeats = 2 if context.dry else 10
    plain: dict[str, float] = {}

    def one(size: str, how: str, steps: Callable[..., Steps]) -> dict[str, Any]:
        step = steps(None if how == "plain" else c, most=how == "most")
        step.run()
        ms = statistics.median(step.run() for _ in range(repeats))
        row = {"ms": round(ms, 3), "temp_mb": round(step.temp_mb, 1)}
        if how == "plain":
            plain[size] = ms
        elif size in plain:
            row["over_plain"] = round(ms / plain[size], 3)
        return row

    sizes: dict[str, Callable[..., Steps]]
    if context.dry:
        sizes = {"tiny 1x64": lambda c, **k: Steps(c, 1, 64, **k)}
    else:
        wide = {"model": large(), "compute": "bfloat16"}
        sizes = {
            "tiny 4x1024": lambda c, **k: Steps(c, 4, 1024, **k),
            "large 8x4096": lambda c, **k: Steps(c, 8, 4096, **wide, **k),
        }
    hows = ("plain", "simulated") if context.dry else ("plain", "simulated", "most")
    return [
        (f"{size} {how}", functools.partial(one, size, how, steps))
        for size, steps in sizes.items()
        for how in hows
    ]


# The tuner.


def furthest(context: Context, count: int = 3) -> list[tuple[str, Workload, float]]:
    """The ops that are furthest from their floor, each by its worst workload."""
    kernel = "xla" if context.dry else "gpu"
    worst: dict[str, dict[str, Any]] = {}
    for row in context.rows("kernels"):
        if row.get("backend") == kernel:
            known = worst.get(row["op"])
            if known is None or row["of_floor"] < known["of_floor"]:
                worst[row["op"]] = row
    chosen = sorted(worst.values(), key=lambda row: row["of_floor"])[:count]
    found = []
    for row in chosen:
        named = [
            load
            for load in workloads(row["op"], context.dry)
            if load.name == row["workload"]
        ]
        found.append((row["op"], named[0], row["of_floor"]))
    return found


def tune(context: Context) -> Rows:
    """Block sizes of three ops in turns, those nearest to the present ones first."""
    program = functools.cache(tuner.prepared)

    def one(op: str, load: Workload, tiles: dict[str, int]) -> dict[str, Any]:
        how: dict[str, Any] = {"backend": "gpu", "tiles": tiles}
        how |= {"interpret": True} if context.dry else {}
        with gpu_target(context.dry):
            repeats = 1 if context.dry else 10
            row = tuner.timed(program(op, load), load, repeats, **how)
        return {"op": op, "workload": load.name, **row}

    chosen = furthest(context, 1 if context.dry else 3)
    if not chosen:
        raise SystemExit("no row of `kernels` to choose from: see its record")
    lists = []
    for op, load, _ in chosen:
        tiles = tuner.candidates(tuner.read_table(op), CHIP)
        lists.append((op, [(load, one) for one in tiles[: 2 if context.dry else None]]))
    return [
        (f"{op} {json.dumps(tiles)}", functools.partial(one, op, load, tiles))
        for op, (load, tiles) in in_turns(lists)
    ]
