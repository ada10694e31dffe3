"""Find the block sizes of an op on the attached device, and write them down.

    python benchmarks/tune.py --op decode_attention --chip h200
    python benchmarks/tune.py --op page_summary --chip v5e --workload bf16 --dry

Every block size of `pallas_kernels/tuned/<op>.json` is tried at a quarter to four
times its default, all combinations, on one workload of the op; a file may list its own
under `"candidates": {"block": [512, 1024]}`. A combination that the compiler refuses is
left out. The fastest goes into the file under the chip's name, with where it came from.
"""

import argparse
import datetime
import functools
import importlib
import itertools
import json
import pathlib
import sys
from typing import Any

import jax
from common import median_s
from common_inputs import filled

from kvjax.pallas_kernels.registry import OPS
from kvjax.pallas_kernels.targets import TARGETS

TUNED = pathlib.Path(__file__).resolve().parent.parent / "pallas_kernels" / "tuned"


def candidates(table: dict[str, Any]) -> list[dict[str, int]]:
    """Combinations of block sizes, the default first."""
    default, listed = table["default"], table.get("candidates", {})
    around = {
        name: listed.get(name, [size // 4, size // 2, size, size * 2, size * 4])
        for name, size in default.items()
    }
    every = itertools.product(*around.values())
    tiles = [dict(zip(default, sizes, strict=True)) for sizes in every]
    usable = [one for one in tiles if min(one.values(), default=1) > 0]
    return [default, *(one for one in usable if one != default)]


def chosen_workload(op: str, name: str) -> Any:
    """The first workload of an op whose name holds `name`."""
    loads = importlib.import_module(f"kvjax.pallas_kernels.{op}.cases").WORKLOADS
    for load in loads:
        if name in load.name:
            return load
    known = [load.name for load in loads]
    raise ValueError(f"`workload` must be part of one of {known}; got {name!r}.")


def sweep(op: str, load: Any, backend: str, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds per combination; what does not compile says why."""
    call = getattr(importlib.import_module(f"kvjax.pallas_kernels.{op}"), op)
    args, kwargs = filled(call, *load.make())
    # Sizes and scales stay Python values: they are part of the program.
    arrays = {n: v for n, v in kwargs.items() if jax.tree.leaves(v) and _array(v)}
    fixed = {n: v for n, v in kwargs.items() if n not in arrays}
    table = json.loads((TUNED / f"{op}.json").read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = []
    for tiles in candidates(table):
        how = {**fixed, "backend": backend, "tiles": tiles}
        run = jax.jit(functools.partial(call, **how))
        try:
            took = median_s(lambda run=run: run(*args, **arrays), repeats)
        except Exception as wrong:  # whatever a compiler raises
            text = (str(wrong).strip().splitlines() or [""])[0][:120]
            rows.append({"tiles": tiles, "error": text})
        else:
            gb_s = round(load.floor_bytes / took / 1e9, 1)
            rows.append({"tiles": tiles, "ms": round(1e3 * took, 4), "gb_s": gb_s})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def _array(value: Any) -> bool:
    return all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(value))


def record(op: str, chip: str, load: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The file of an op with the fastest combination under the chip's name."""
    table = json.loads((TUNED / f"{op}.json").read_text(encoding="utf-8"))
    timed = [row for row in rows if "ms" in row]
    if not timed:
        raise ValueError(f"nothing of {op} ran: {rows[0]['error']}")
    best = min(timed, key=lambda row: row["ms"])
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    said = (
        f"{chip}: benchmarks/tune.py, {today}, {jax.devices()[0].device_kind}, jax "
        f"{jax.__version__}, {load.name}: {best['ms']} ms, the fastest of {len(timed)}."
    )
    kept = [s for s in table["source"].split("\n") if not s.startswith(f"{chip}: ")]
    return {**table, chip: best["tiles"], "source": "\n".join([*kept, said])}


def main() -> int:
    """Sweep, print, write."""
    parser = argparse.ArgumentParser(prog="benchmarks/tune.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--op", required=True, choices=list(OPS))
    parser.add_argument("--chip", required=True, choices=list(TARGETS))
    parser.add_argument("--workload", default="", help="part of its name")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--dry", action="store_true", help="only print")
    args = parser.parse_args()
    target = TARGETS[args.chip]
    device = jax.devices()[0]
    if device.device_kind != target.device_kind:
        parser.error(f"the attached device is {device.device_kind!r}, no {args.chip}")
    load = chosen_workload(args.op, args.workload)
    rows = sweep(args.op, load, target.backend, args.repeats)
    table = record(args.op, args.chip, load, rows)
    print(json.dumps({"op": args.op, "rows": rows, "best": table[args.chip]}))
    if not args.dry:
        path = TUNED / f"{args.op}.json"
        path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
