"""One stage of `make device`: its rows in order, each a JSON record on a line.

    python benchmarks/device.py card --out DIR [--dry]

`tools/device.py` runs this, a process for each stage, writes the records down and ends
what hangs. A row that failed is a record as well; a device that no longer answers after
one ends the process, and a new one goes on behind that row (`--first`).
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from common import about
from device_parity import parity
from device_stages import Context, Rows, card, decode, kernels, train, tune

STAGES: Mapping[str, Callable[[Context], Rows]] = MappingProxyType(
    {
        "parity": parity,
        "card": card,
        "kernels": kernels,
        "decode": decode,
        "train": train,
        "tune": tune,
    }
)
EXPECTED = ("decode", "tune")
"""Stages whose rows cost alike: one that would not fit any more is not begun."""

PATIENCE: Mapping[str, float] = MappingProxyType(
    {"parity": 25, "card": 40, "kernels": 60, "decode": 90, "train": 60, "tune": 25}
)
"""Seconds after which a row counts as hung; the first of a process has as many more."""

UNWELL = 3
"""Exit code after a row that left the device unable to answer."""


def say(**record: Any) -> None:
    """A record for the process that reads them."""
    print(json.dumps(record), flush=True)


def machine(dry: bool) -> dict[str, Any]:
    """What the figures of this process belong to."""
    device = jax.devices()[0]
    smi = ["nvidia-smi", "--query-gpu=driver_version,memory.total"]
    try:
        done = subprocess.run(
            [*smi, "--format=csv,noheader"], capture_output=True, text=True
        )
        driver = done.stdout.strip() or None
    except OSError:
        driver = None
    runtime = getattr(device.client, "platform_version", "")
    return {
        "dry": dry,
        **about(),
        "platform": device.platform,
        "runtime": " ".join(runtime.split())[:200],
        "driver": driver,
    }


def answers() -> bool:
    """Whether the device still computes."""
    try:
        return float(jnp.sum(jnp.ones(8))) == 8.0
    except Exception:  # whatever a lost device raises
        return False


def measured(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row and its seconds, or why there is none."""
    start = time.perf_counter()
    try:
        row = call()
    except Exception as wrong:  # whatever a compiler or a device raises
        text = (str(wrong).strip().splitlines() or [""])[0][:300]
        row = {"error": f"{type(wrong).__name__}: {text}"}
    return {**row, "seconds": round(time.perf_counter() - start, 2)}


def run(stage: str, rows: Rows, first: int, until: float, patience: float) -> int:
    """All rows from `first` on, those left out for want of time named."""
    last, most = 0.0, 2 * patience
    for number, (name, call) in enumerate(rows):
        if number < first:
            continue
        left = until - time.time()
        if left <= (last if stage in EXPECTED else 0.0):
            why = f"{max(0.0, left):.0f} s were left, the last row took {last:.0f}"
            say(row={"name": name, "skipped": why})
            continue
        say(starts=number, name=name, silent=most)
        most = patience
        row = measured(call)
        last = row["seconds"]
        say(row={"name": name, **row})
        if "error" in row and not answers():
            return UNWELL
    say(done=True)
    return 0


def main() -> int:
    """Run the rows of one stage."""
    parser = argparse.ArgumentParser(prog="benchmarks/device.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--first", type=int, default=0, help="skip rows before it")
    parser.add_argument("--until", type=float, default=float("inf"), help="Unix time")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on any device")
    args = parser.parse_args()
    rows = STAGES[args.stage](Context(out=args.out, dry=args.dry, first=args.first))
    say(about=machine(args.dry))
    say(total=len(rows))
    patience = PATIENCE[args.stage] * (4 if args.dry else 1)  # on a busy machine
    return run(args.stage, rows, args.first, args.until, patience)


if __name__ == "__main__":
    sys.exit(main())
