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
LOGS = ROOT / ".cache"
CACHE = "JAX_COMPILATION_CACHE_DIR"
MOST = 4  # processes at a time; one takes up to 4 GB


def pytest(folder: str, *args: str, log: pathlib.Path | None = None) -> int:
    """Exit status of a process whose output goes to `log`, or is shown."""
    base = pathlib.Path(os.environ.get(CACHE) or ROOT / ".cache" / "jax")
    command = [sys.executable, "-m", "pytest", folder, *args]
    env = {**os.environ, CACHE: str(base / folder)}
    if log is None:
        return subprocess.run(command, cwd=ROOT, env=env).returncode
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        return subprocess.run(
            command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT
        ).returncode


def folders() -> list[str]:
    """Those with tests, the largest first: it should not be what is waited for."""
    sizes: dict[str, int] = {}
    for path in TESTS.glob("*/test_*.py"):
        folder = f"tests/{path.parent.name}"
        sizes[folder] = sizes.get(folder, 0) + path.stat().st_size
    return sorted(sizes, key=lambda folder: -sizes[folder])


def main(options: list[str]) -> int:
    """Run all of them, whatever fails; 1 if anything did, or if a folder was empty."""
    start, failed = time.monotonic(), []
    logs = {folder: LOGS / f"{folder}.log" for folder in folders()}
    jobs = min(MOST, os.cpu_count() or 1)
    print(
        f"{jobs} at a time, each shown when it ends; logs in {LOGS}/tests", flush=True
    )
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        tasks = {
            pool.submit(pytest, folder, *options, log=log): folder
            for folder, log in logs.items()
        }
        for task in concurrent.futures.as_completed(tasks):
            folder, seconds = tasks[task], time.monotonic() - start
            text = logs[folder].read_text(encoding="utf-8", errors="replace")
            print(f"\n{folder}, ended after {seconds:.0f} s:\n{text}", flush=True)
            if task.result():
                failed.append(folder)
    if failed:
        print(f"failed: {', '.join(failed)}; the rest follows", flush=True)
    status = pytest("tests", *(f"--ignore={folder}" for folder in logs), *options)
    return 1 if failed or status else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
