"""Everything there is to test, for a release: `make test-all`.

All cases of all tests under the compiler's full optimisation, and the kernels through
the compilers of all chips. With `newest` the tests run in `.venv-newest`, which has the
newest JAX that pyproject.toml admits.
"""

import os
import pathlib
import subprocess
import sys
import tomllib
from typing import Any

import kernels

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORKERS = ["-n", "auto", "--maxprocesses", "4"]
WHOLE_FILES = ["--dist", "loadfile", "--no-loadscope-reorder"]


def newest() -> str:
    """An interpreter with the locked dependencies, but the newest JAX."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [x for x in project["project"]["dependencies"] if x.startswith("jax>")]
    pins: dict[str, Any] = dict(kernels.PINS, newest=("--upgrade", *wanted))
    kernels.PINS = pins
    kernels.make("newest")
    return str(ROOT / ".venv-newest" / "bin" / "python")


def main(which: str = "locked", *options: str) -> int:
    """Run all of it, whatever fails; 1 if anything did."""
    python = newest() if which == "newest" else sys.executable
    failed = 0
    if which == "locked":
        command = [python, "tools/kernels.py"]
        failed |= subprocess.run(command, cwd=ROOT).returncode
    version = "import jax; print('JAX', jax.__version__)"
    subprocess.run([python, "-c", version], cwd=ROOT, check=True)
    command = [python, "-m", "pytest", "-q", *WORKERS, *WHOLE_FILES]
    command += ["--level", "all", "--durations", "10", *options]
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    failed |= subprocess.run(command, cwd=ROOT, env=environment).returncode
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
