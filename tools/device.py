"""Everything that needs a GPU, in minutes, written down as it comes: `make device`.

    make device                        benchmarks/results/device/, nine minutes at most
    make device OUT=DIR BUDGET=300 STAGES="card kernels"
    make device DRY=1                  tiny sizes on the CPU: does the command work?

Stages in order: parity of every kernel; what the card copies and multiplies; the
kernels against that and against what they replace; decode of a Llama-3.1-8B with random
weights; a training step; the tuner. Each is a process of its own and gets a share of
what is left of the budget. Rows are written to `<stage>.json` as they come; what fails,
hangs or no longer fits is a record too, and the next one runs. `log.txt` has what was
said.

Needs a Python with JAX that sees the GPU, and no network: `make device-pack` collects
beforehand, where there is one, what else is to be carried.
"""

import argparse
import json
import math
import os
import pathlib
import signal
import sys
import time
from typing import Any, NamedTuple

import device_python
import streams

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "device"
DRY_RESULTS = ROOT / ".cache" / "device-dry"
BUDGET_S = 540.0
RESTARTS = 8  # of one stage; each costs seconds


class Stage(NamedTuple):
    """Seconds of a full budget, and the environment of a stage."""

    seconds: float
    environment: dict[str, str]


STAGES = {
    "parity": Stage(120, {}),
    "card": Stage(20, {}),
    # torch runs beside it on the same card.
    "kernels": Stage(110, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}),
    # 16 GB of weights, and twice a cache of 17 GB.
    "decode": Stage(180, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}),
    "train": Stage(40, {}),
    "tune": Stage(70, {}),
}


def command(python: str, stage: str, *args: str) -> list[str]:
    """What runs a stage."""
    return [python, str(ROOT / "benchmarks" / "device.py"), stage, *args]


def environment(stage: str, dry: bool, site: pathlib.Path | None) -> dict[str, str]:
    """Of a stage; compiled programs are kept for a second try on the same machine."""
    kept = ROOT / ".cache" / ("jax-dry" if dry else "jax-device")
    fixed = {"PYTHONPATH": device_python.path(site), "PYTHONUNBUFFERED": "1"}
    if dry:
        # Mosaic's interpreter waits for itself in a pool of one thread.
        fixed |= {"JAX_PLATFORMS": "cpu", "NPROC": str(max(2, os.cpu_count() or 1))}
    cache = {"JAX_COMPILATION_CACHE_DIR": str(kept)}
    return {**cache, **os.environ, **STAGES[stage].environment, **fixed}


def limit(stage: str, names: list[str], left: float) -> float:
    """Seconds of a stage: its share of what is left for it and those behind it."""
    behind = names[names.index(stage) :]
    return left * STAGES[stage].seconds / sum(STAGES[one].seconds for one in behind)


class Record:
    """The file of a stage, whole at every moment."""

    def __init__(self, out: pathlib.Path, stage: str, seconds: float, dry: bool):
        self.path = out / f"{stage}.json"
        self.start = time.monotonic()
        self.told: dict[str, Any] = {"stage": stage, "dry": dry, "status": "running"}
        self.told |= {"limit_s": round(seconds, 1), "seconds": 0.0}
        self.rows: list[dict[str, Any]] = []
        self.write()

    def write(self, **more: Any) -> None:
        """Put it on the disk."""
        self.told |= more
        self.told["seconds"] = round(time.monotonic() - self.start, 1)
        written(self.path, {**self.told, "rows": self.rows})

    def add(self, row: dict[str, Any]) -> None:
        """One more row, also for whoever watches."""
        self.rows.append(row)
        self.write()
        print(f"{self.told['stage']:8} {line(row)}", flush=True)

    def summary(self) -> dict[str, Any]:
        """Status, seconds, and what became of the rows."""
        keys = ("status", "seconds", "limit_s", "error")
        kinds = [
            next((k for k in ("error", "skipped") if k in r), "ok") for r in self.rows
        ]
        counts = {kind: kinds.count(kind) for kind in ("ok", "error", "skipped")}
        told = {key: self.told[key] for key in keys if key in self.told}
        return {**told, "rows": counts}


def written(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Write a JSON file so that nobody finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)


def line(row: dict[str, Any]) -> str:
    """A row for a reader: name, then its figures."""

    def flat(prefix: str, value: Any):
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from flat(f"{prefix}.{key}" if prefix else key, inner)
        elif prefix not in ("name", "op", "workload") and "aim" not in prefix:
            yield (
                f"{prefix}={value:.4g}"
                if isinstance(value, float)
                else (f"{prefix}={value}")
            )

    return f"{row.get('name', '?'):44} " + " ".join(flat("", row))


def run_stage(python: str, record: Record, until: float, log: Any, **how: Any) -> None:
    """All rows of a stage; one that ends or hangs its process costs no other row."""
    stage = record.told["stage"]
    first = 0
    for _ in range(RESTARTS + 1):
        left = max(0.0, until - time.monotonic())
        args = ["--out", str(record.path.parent), "--first", str(first)]
        args += ["--until", str(time.time() + left - 3)]
        args += ["--dry"] if how["dry"] else []
        place = {"environment": environment(stage, how["dry"], how["site"])}
        at = log.tell()
        told, pending, done = follow(
            streams.records(
                command(python, stage, *args), silent=90, said=log, until=until, **place
            ),
            record,
        )
        if done:
            return record.write(status="done")
        why = reason(told, log, at)
        if pending is not None:
            record.add({"name": pending["name"], "error": why})
        if told["end"] == "time":
            return record.write(status="out of time", error=why)
        if pending is None:
            if told["code"] != UNWELL:
                return record.write(status="failed", error=why)
            first = len(record.rows)
        else:
            first = pending["starts"] + 1
    record.write(status="failed", error=f"gave up after {RESTARTS} restarts")


UNWELL = 3  # as in benchmarks/device.py: the device no longer answered after a row


def follow(records: Any, record: Record) -> tuple[dict, dict | None, bool]:
    """How a process ended, the row that it was in, and whether it came to its end."""
    pending, done, last = None, False, {}
    for last in records:
        if "about" in last:
            record.write(**last["about"])
        elif "starts" in last:
            pending = last
        elif "row" in last:
            record.add(last["row"])
            pending = None
        done |= "done" in last
    return last, pending, done


def reason(told: dict[str, Any], log: Any, at: int) -> str:
    """Why a process is over, in one line."""
    log.flush()
    log.seek(at)
    said = [text.strip() for text in log.read().splitlines() if text.strip()]
    log.seek(0, os.SEEK_END)
    if told["end"] == "time":
        return "the stage's time was over"
    if told["end"] == "silent":
        return "it hung, and was ended"
    last = said[-1][:200] if said else "it said nothing"
    return f"the process ended with code {told['code']}: {last}"


def measured_there(out: pathlib.Path, stages: list[str]) -> list[str]:
    """Files that a dry run would write over something measured."""
    found = []
    for stage in stages:
        path = out / f"{stage}.json"
        if path.is_file() and not json.loads(path.read_text()).get("dry", False):
            found.append(str(path))
    return found


def run(args: argparse.Namespace, python: str, site: pathlib.Path | None) -> int:
    """All stages; 1 if anything failed."""
    summary: dict[str, Any] = {"dry": args.dry, "python": python}
    summary |= {"budget_s": args.budget, "stages": {}}
    with (args.out / "log.txt").open("w+", errors="replace") as log:
        for stage in args.stages:
            left = args.budget - (time.monotonic() - args.begin)
            seconds = limit(stage, args.stages, left)
            record = Record(args.out, stage, seconds, args.dry)
            if seconds <= 0:
                record.write(status="out of time", error="the budget was spent")
            else:
                until = time.monotonic() + seconds
                run_stage(python, record, until, log, dry=args.dry, site=site)
            summary["stages"][stage] = record.summary()
            summary["seconds"] = round(time.monotonic() - args.begin, 1)
            written(args.out / "summary.json", summary)
    print("\n" + table(summary), flush=True)
    return int(any(bad(one) for one in summary["stages"].values()))


def bad(stage: dict[str, Any]) -> bool:
    """Whether a stage did not do all that it was asked for."""
    return stage["status"] != "done" or bool(stage["rows"]["error"])


def table(summary: dict[str, Any]) -> str:
    """What became of the stages."""
    lines = [f"{'stage':8} {'status':12} {'s':>6} {'of':>5} {'ok':>4} error skipped"]
    for name, one in summary["stages"].items():
        rows = one["rows"]
        lines.append(
            f"{name:8} {one['status']:12} {one['seconds']:6.1f} {one['limit_s']:5.0f} "
            f"{rows['ok']:4} {rows['error']:5} {rows['skipped']:7} "
            f"{one.get('error', '')}".rstrip()
        )
    dry = "DRY: nothing here is a measurement. " if summary["dry"] else ""
    return "\n".join([*lines, f"{dry}{summary['seconds']:.0f} s in all"])


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="tools/device.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--python", help="with JAX; without: this one, then .venv's")
    parser.add_argument("--out", type=pathlib.Path, help=f"default: {RESULTS}")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds in all")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=[*STAGES])
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU")
    args = parser.parse_args(argv)
    if not (math.isfinite(args.budget) and args.budget > 0):
        parser.error(f"--budget must be positive seconds; got {args.budget}")
    args.stages = [stage for stage in STAGES if stage in args.stages]
    args.begin = time.monotonic()
    args.out = args.out or (DRY_RESULTS if args.dry else RESULTS)
    if args.dry and (there := measured_there(args.out, args.stages)):
        parser.error(
            f"a dry run does not replace what was measured: {there}; see --out"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def main() -> int:
    """Check the interpreter, then measure."""
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what it started
    try:
        python, site, found = device_python.chosen(args.python, args.dry)
    except ValueError as wrong:
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    print(
        f"device: {python}: jax {found['versions']['jax']}, {found['kind']}", flush=True
    )
    return run(args, python, site)


if __name__ == "__main__":
    sys.exit(main())
