"""Compile the kernels for chips that are not here, and print what came out.

    make kernels                                  all targets
    python tools/kernels.py --targets v5e --op column_stats
    python tools/kernels.py --write               also benchmarks/results/

The compilers come as wheels, in environments of their own beside `.venv`: with libtpu
installed a plain `import jax` talks to it, and CUDA's wheels weigh 4.4 GB. Both are
made from the same lock as `.venv`, plus `PINS`. `KVJAX_TPU_PYTHON` and
`KVJAX_CUDA_PYTHON` name interpreters to use instead.
"""

import argparse
import datetime
import fnmatch
import hashlib
import importlib.util
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
from typing import Any

import streams

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "kernels_compile.json"
PINS = {"tpu": ("libtpu==0.0.51",), "cuda": ("jax[cuda13]==0.11.2",)}
OPTIONAL = ("cuda",)  # 4.4 GB are not for every machine; libtpu is
LIMIT_S = 300.0


def load(path: pathlib.Path) -> Any:
    """A file of the tree as a module, without importing kvjax and JAX."""
    spec = importlib.util.spec_from_file_location(f"kernels_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


TARGETS = load(ROOT / "pallas_kernels" / "targets.py")


def make(family: str) -> None:
    """Make the environment of a family unless it is there; exits if it cannot."""
    setup = load(ROOT / "tools" / "setup.py")
    uv = setup.VENV / "bin" / "uv"
    setup.VENV = ROOT / f".venv-{family}"
    setup.PYTHON = setup.VENV / "bin" / "python"
    stamp = setup.VENV / ".kvjax-setup"
    pins = PINS[family]
    want = hashlib.sha256((setup.fingerprint() + " ".join(pins)).encode()).hexdigest()
    if setup.PYTHON.exists() and stamp.exists() and stamp.read_text() == want:
        return
    usable = setup.usable(setup.version(sys.executable))
    executable = sys.executable if usable else setup.find_python()
    print(f"kernels: {setup.VENV.name} with {executable}", flush=True)
    if not setup.run(executable, "-m", "venv", "--clear", setup.VENV):
        sys.exit(f"error: {executable} could not make {setup.VENV.name}.")
    locked = setup.install_with_uv() or setup.install_with_pip()
    uv = uv if uv.exists() else setup.VENV / "bin" / "uv"
    extra = [uv, "pip", "install", "-q", "--python", setup.PYTHON, *pins]
    pip = [setup.PYTHON, "-m", "pip", "install", "-q", *pins]
    if not locked or not (setup.run(*extra) or setup.run(*pip)):
        sys.exit(f"error: {', '.join(pins)} could not be installed.")
    stamp.write_text(want)


def interpreter(family: str) -> tuple[str | None, str]:
    """The Python that has a family's compiler, or None and why there is none."""
    given = os.environ.get(f"KVJAX_{family.upper()}_PYTHON")
    if given:
        return given, ""
    command = [sys.executable, __file__, "--make", family]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode == 0:
        return str(ROOT / f".venv-{family}" / "bin" / "python"), ""
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return None, " / ".join(lines[-3:])[-400:] or f"exit code {done.returncode}"


def compile_target(
    python: str, target: Any, op: str | None, limit: float = LIMIT_S
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Versions and rows of one target.

    A compiler that ends its process costs the program that did it, and no other: the
    rest is compiled by a new process.
    """
    versions: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    first = 0
    while True:
        command = [python, "-m", "kvjax.pallas_kernels.compile", "--json"]
        command += ["--target", target.name, "--first", str(first)]
        command += ["--op", op] if op else []
        records, code, said = watch(command, limit)
        pending, done = None, False
        for record in records:
            versions = record.get("versions", versions)
            done |= "done" in record
            if "starts" in record:
                pending = record
            elif "op" in record:
                rows.append(record)
                pending = None
        if done:
            return versions, rows
        last = said.strip().splitlines()[-1:] or ["it said nothing"]
        reason = f"the process ended with code {code}: {last[0][:200]}"
        row = pending or {"op": op or "*", "workload": "*", "target": target.name}
        rows.append({**row, "status": "failed", "reason": reason})
        if pending is None:
            return versions, rows
        first = pending["starts"] + 1


def watch(command: list[str], limit: float) -> tuple[list[dict[str, Any]], int, str]:
    """Records that a command prints, its exit code, and what else it said.

    It is ended when it prints no record for `limit` seconds.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as said:
        how = {"silent": limit, "said": said, "environment": environment}
        *records, end = streams.records(command, **how)
        said.seek(0)
        return records, end["code"], said.read()


def declared(row: dict[str, Any], docs: pathlib.Path = ROOT / "docs/kernels") -> bool:
    """Whether the page of an op names this refusal.

    A line of the page says it: "- `gpu`, `int2-*`: reason", or without a workload.
    """
    page = docs / f"{row['op']}.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    for backend, pattern in re.findall(
        r"^- `(tpu|gpu)`(?:, `([^`]+)`)?: ", text, re.MULTILINE
    ):
        if backend == row["backend"] and fnmatch.fnmatch(
            row["workload"], pattern or "*"
        ):
            return True
    return False


def size(count: int | None) -> str:
    """Bytes for a reader."""
    if count is None:
        return "-"
    for unit, step in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= step:
            return f"{count / step:.1f} {unit}"
    return f"{count} B"


def ratio(count: int | None, floor: int | None) -> str:
    """Bytes against the floor."""
    return f"{count / floor:.2f}" if count and floor else "-"


HEAD: tuple[str, ...] = (
    "op",
    "workload",
    "target",
    "backend",
    "status",
    "s",
    "on-chip",
    "temp",
    "cost/floor",
    "specs/floor",
)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in columns, and below them why some are not ok."""
    lines, notes = [HEAD], []
    for row in rows:
        backward = " backward" if row.get("pass_") == "backward" else ""
        name = f"{row['workload']}{backward}"
        floor, seconds = row.get("floor_bytes"), row.get("compile_s")
        lines.append(
            (
                row["op"],
                name,
                row["target"],
                row.get("backend") or "-",
                row["status"],
                "-" if seconds is None else f"{seconds:.1f}",
                size(row.get("onchip_bytes")),
                size(row.get("temp_bytes")),
                ratio(row.get("hbm_bytes"), floor),
                ratio(row.get("spec_bytes"), floor),
            )
        )
        if row.get("reason"):
            where = f"{row['op']} {name} {row['target']}"
            notes.append(f"{where}: {row['status']}: {row['reason']}")
        if row.get("spill_bytes"):
            notes.append(f"{row['op']} {name}: {row['spill_bytes']} bytes spilled")
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in [*text, "", *notes]).rstrip()


def failures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that make the exit code 1: failed, or refused and nowhere declared."""
    return [
        row
        for row in rows
        if row["status"] == "failed"
        or (row["status"] == "refused" and not declared(row))
        or (row["status"] == "not compiled" and row["family"] not in OPTIONAL)
    ]


def collect(args: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Versions and rows of all chosen targets."""
    versions: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    found: dict[str, tuple[str | None, str]] = {}
    for target in TARGETS.chosen(args.targets):
        if target.family not in found:
            found[target.family] = interpreter(target.family)
        python, reason = found[target.family]
        if python is None:
            print(f"kernels: not compiled for {target.name}: {reason}", flush=True)
            row = {"op": args.op or "*", "workload": "*", "target": target.name}
            row |= {"status": "not compiled", "reason": reason}
            rows.append({**row, "family": target.family})
            continue
        print(f"kernels: compiling for {target.name}", file=sys.stderr, flush=True)
        versions[target.name], more = compile_target(python, target, args.op)
        rows += more
    rows.sort(key=lambda row: row["op"])  # stable: targets stay in order
    return versions, rows


def main() -> int:
    """Compile, print the table; 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    known = [*TARGETS.FAMILIES, *(t.name for t in TARGETS.chosen(TARGETS.FAMILIES))]
    parser.add_argument(
        "--targets", nargs="+", choices=known, default=list(TARGETS.FAMILIES)
    )
    parser.add_argument("--op")
    parser.add_argument("--write", action="store_true", help=f"also {RECORD.name}")
    parser.add_argument("--make", choices=list(PINS), help="only the environment")
    args = parser.parse_args()
    if args.make:
        make(args.make)
        return 0
    versions, rows = collect(args)
    print(table(rows))
    if args.write:
        record = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.system()} {platform.machine()}",
            "versions": versions,
            "rows": rows,
        }
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    bad = failures(rows)
    compiled = sum(row["status"] == "ok" for row in rows)
    print(f"kernels: {compiled} of {len(rows)} programs compiled, {len(bad)} failures")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
