"""Runs every benchmark of this folder and collects what they print as JSON.

A benchmark is a script that prints one JSON object; `common*.py`, `tune.py`,
`device*.py` and the `torch_*.py` that other interpreters run are none. Each runs in a
process of its own, so that none sees the memory or the compiled programs of another:

    python benchmarks/run.py                       all of them
    python benchmarks/run.py decode --out b.json   those whose name holds "decode"
"""

import argparse
import datetime
import json
import pathlib
import platform
import subprocess
import sys
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent


def scripts(names: list[str]) -> list[pathlib.Path]:
    """The benchmarks whose name holds one of `names`, or all."""
    helpers = ("run", "common", "torch_", "tune", "device")
    found = [p for p in sorted(HERE.glob("*.py")) if not p.stem.startswith(helpers)]
    chosen = [path for path in found if any(n in path.stem for n in names or [""])]
    if names and not chosen:
        known = [path.stem for path in found]
        raise ValueError(f"no benchmark named like {names}; there are {known}.")
    return chosen


def run(path: pathlib.Path, limit: float) -> dict[str, Any]:
    """The result of one script, or why there is none."""
    command = [sys.executable, str(path)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"longer than {limit:.0f} s"}
    if done.returncode:
        return {"error": f"exit code {done.returncode}"}
    try:
        return {"result": json.loads(done.stdout)}
    except ValueError:
        return {"error": f"not one JSON object: {done.stdout[:200]!r}"}


def main() -> int:
    """Run and collect; the exit code is 1 if a benchmark failed."""
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    parser.add_argument("--limit", type=float, default=3600, help="seconds per script")
    args = parser.parse_args()
    try:
        chosen = scripts(args.names)
    except ValueError as wrong:
        parser.error(str(wrong))
    results: dict[str, Any] = {}
    for path in chosen:
        print(f"{path.stem} ...", file=sys.stderr, flush=True)
        results[path.stem] = run(path, args.limit)
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "benchmarks": results,
    }
    text = json.dumps(record, indent=2)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return int(any("error" in result for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
