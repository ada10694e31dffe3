"""Runs the tests, several folders at a time: `make test`, with pytest's options.

Each folder of `tests/` has a process of its own (thousands of compiled programs in one
have crashed XLA), whose output is shown when it has ended, and its own folder under
`.cache/jax/`: JAX writes compiled programs in place, and another process could read
half of one. What lies in `tests/` itself comes last and alone, so that the last line is
pytest's own.

A process keeps less than one and a half cores busy, since tracing is serial.
"""

import concurrent.futures
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
CACHE = "JAX_COMPILATION_CACHE_DIR"
MOST = 4  # processes at a time; one takes up to 4 GB


def pytest(folder: str, *args: str, shown: bool) -> tuple[int, str]:
    """Exit status and, unless it was shown, the output of a process."""
    base = pathlib.Path(os.environ.get(CACHE) or ROOT / ".cache" / "jax")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", folder, *args],
        cwd=ROOT,
        env={**os.environ, CACHE: str(base / folder)},
        stdout=None if shown else subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout or ""


def folders() -> list[str]:
    """Those with tests, the largest first: it should not be what is waited for."""
    sizes: dict[str, int] = {}
    for path in TESTS.glob("*/test_*.py"):
        folder = f"tests/{path.parent.name}"
        sizes[folder] = sizes.get(folder, 0) + path.stat().st_size
    return sorted(sizes, key=lambda folder: -sizes[folder])


def main(options: list[str]) -> int:
    """Run all of them, whatever fails; 1 if anything did, or if a folder was empty."""
    start, failed, parts = time.monotonic(), [], folders()
    jobs = min(MOST, os.cpu_count() or 1)
    print(f"{jobs} at a time, shown as they end: {', '.join(parts)}", flush=True)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        tasks = {
            pool.submit(pytest, part, *options, shown=False): part for part in parts
        }
        for task in concurrent.futures.as_completed(tasks):
            status, text = task.result()
            seconds = time.monotonic() - start
            print(f"\n{tasks[task]}, ended after {seconds:.0f} s:\n{text}", flush=True)
            if status:
                failed.append(tasks[task])
    if failed:
        print(f"failed: {', '.join(failed)}; the rest follows", flush=True)
    ignored = [f"--ignore={part}" for part in parts]
    status, _ = pytest("tests", *ignored, *options, shown=True)
    return 1 if failed or status else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
