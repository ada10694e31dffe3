"""Find the block sizes of an op on the attached device, and write them down.

    python benchmarks/tune.py --op decode_attention --chip h200
    python benchmarks/tune.py --op page_summary --chip v5e --workload bf16 --dry
    python benchmarks/tune.py --op block_score --chip h200 --measured tune.json

Every block size of `pallas_kernels/tuned/<op>.json` is tried at a quarter to four
times what the chip has (or the default), on one workload of the op: all combinations of
one or two sizes, more than two one at a time. A file may list its own under
`"candidates": {"block": [512, 1024]}`. A combination that the compiler refuses is left
out. The fastest goes into the file under the chip's name, with where it came from.
`--measured` takes the rows from a record of `make device` instead.
"""

import argparse
import datetime
import functools
import importlib
import itertools
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
from common import median_s
from common_inputs import filled

from kvjax.pallas_kernels.parity import public
from kvjax.pallas_kernels.registry import OPS
from kvjax.pallas_kernels.targets import TARGETS

TUNED = pathlib.Path(__file__).resolve().parent.parent / "pallas_kernels" / "tuned"


def candidates(table: dict[str, Any], chip: str) -> list[dict[str, int]]:
    """Block sizes to try: the chip's, and around them; those closest to them first."""
    base, listed = table.get(chip, table["default"]), table.get("candidates", {})
    around = {
        name: listed.get(name, [size // 2, size * 2, size // 4, size * 4])
        for name, size in base.items()
    }
    at_once = len(base) if len(base) <= 2 else 1
    tiles = []
    for changed in range(at_once + 1):
        for names in itertools.combinations(base, changed):
            for sizes in itertools.product(*(around[name] for name in names)):
                tiles.append({**base, **dict(zip(names, sizes, strict=True))})
    usable = [one for one in tiles if min(one.values(), default=1) > 0]
    return [one for i, one in enumerate(usable) if one not in usable[:i]]


def read_table(op: str) -> dict[str, Any]:
    """The file of block sizes of an op."""
    return json.loads((TUNED / f"{op}.json").read_text(encoding="utf-8"))


def chosen_workload(op: str, name: str) -> Any:
    """The first workload of an op whose name holds `name`."""
    loads = importlib.import_module(f"kvjax.pallas_kernels.{op}.cases").WORKLOADS
    for load in loads:
        if name in load.name:
            return load
    known = [load.name for load in loads]
    raise ValueError(f"`workload` must be part of one of {known}; got {name!r}.")


def prepared(op: str, load: Any) -> Callable[..., Callable[[], Any]]:
    """Takes settings of the op, gives a compiled call on the workload's arrays."""
    call = public(op)
    args, kwargs = filled(call, *load.make())
    # Sizes and scales stay Python values: they are part of the program.
    arrays = {n: v for n, v in kwargs.items() if jax.tree.leaves(v) and _array(v)}
    fixed = {n: v for n, v in kwargs.items() if n not in arrays}

    def program(**how: Any) -> Callable[[], Any]:
        run = jax.jit(functools.partial(call, **fixed, **how))
        return lambda: run(*args, **arrays)

    return program


def timed(program: Any, load: Any, repeats: int, **how: Any) -> dict[str, Any]:
    """Milliseconds of one combination; what does not compile says why."""
    row = {"tiles": how["tiles"]}
    try:
        took = median_s(program(**how), repeats)
    except Exception as wrong:  # whatever a compiler raises
        text = (str(wrong).strip().splitlines() or [""])[0][:120]
        return {**row, "error": f"{type(wrong).__name__}: {text}"}
    gb_s = round(load.floor_bytes / took / 1e9, 1)
    return {**row, "ms": round(1e3 * took, 4), "gb_s": gb_s}


def sweep(op: str, chip: str, load: Any, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds per combination."""
    program, backend = prepared(op, load), TARGETS[chip].backend
    rows: list[dict[str, Any]] = []
    for tiles in candidates(read_table(op), chip):
        rows.append(timed(program, load, repeats, backend=backend, tiles=tiles))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def _array(value: Any) -> bool:
    return all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(value))


def record(op: str, chip: str, rows: list[dict[str, Any]], said: str) -> dict[str, Any]:
    """The file of an op with the fastest combination under the chip's name."""
    table = read_table(op)
    timed = [row for row in rows if "ms" in row]
    if not timed:
        raise ValueError(f"nothing of {op} ran: {[row.get('error') for row in rows]}")
    best = min(timed, key=lambda row: row["ms"])
    said = (
        f"{chip}: benchmarks/tune.py, {said}: {best['ms']} ms, the fastest of "
        f"{len(timed)}."
    )
    kept = [s for s in table["source"].split("\n") if not s.startswith(f"{chip}: ")]
    return {**table, chip: best["tiles"], "source": "\n".join([*kept, said])}


def attached(args: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """Rows of the attached device, and when and on what they were measured.

    Raises:
        ValueError: it is another chip.
    """
    kind = jax.devices()[0].device_kind
    if kind != TARGETS[args.chip].device_kind:
        raise ValueError(f"the attached device is {kind!r}, no {args.chip}")
    load = chosen_workload(args.op, args.workload)
    rows = sweep(args.op, args.chip, load, args.repeats)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return rows, f"{today}, {kind}, jax {jax.__version__}, {load.name}"


def measured(args: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """The same from a record of `make device`.

    Raises:
        ValueError: it is a dry one, or has no rows of the op.
    """
    told = json.loads(args.measured.read_text(encoding="utf-8"))
    rows = [row for row in told["rows"] if row.get("op") == args.op]
    if told["dry"] or not rows:
        raise ValueError(f"{args.measured} holds nothing measured of {args.op}")
    where = f"{told['date'][:10]}, {told['device']}, jax {told['jax']}"
    return rows, f"{where}, {rows[0]['workload']}"


def main() -> int:
    """Sweep, print, write."""
    parser = argparse.ArgumentParser(prog="benchmarks/tune.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--op", required=True, choices=list(OPS))
    parser.add_argument("--chip", required=True, choices=list(TARGETS))
    parser.add_argument("--workload", default="", help="part of its name")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--measured", type=pathlib.Path, help="rows that are there")
    parser.add_argument("--dry", action="store_true", help="only print")
    args = parser.parse_args()
    try:
        rows, said = measured(args) if args.measured else attached(args)
        table = record(args.op, args.chip, rows, said)
    except ValueError as wrong:
        parser.error(str(wrong))
    print(json.dumps({"op": args.op, "rows": rows, "best": table[args.chip]}))
    if not args.dry:
        path = TUNED / f"{args.op}.json"
        path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
