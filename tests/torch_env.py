"""Finds an interpreter that has PyTorch, and runs reference scripts in it.

Parity tests compare kvjax with PyTorch libraries that need not be installed beside
it: the scripts run in a process of their own and hand over an npz file. The
environment variable `KVJAX_TORCH_PYTHON` names the interpreter; without it the
tests' own is tried.
"""

import functools
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence

import numpy as np

VARIABLE = "KVJAX_TORCH_PYTHON"
MODULES = ("torch", "transformers", "kvpress")
HERE = pathlib.Path(__file__).parent


@functools.cache
def _missing(python: str, modules: tuple[str, ...]) -> tuple[str, ...]:
    code = (
        "import importlib.util as u, sys;"
        "print(*(m for m in sys.argv[1:] if u.find_spec(m) is None))"
    )
    command = [python, "-c", code, *modules]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60
    )
    return tuple(done.stdout.split())


def find_torch_python(modules: Sequence[str] = MODULES) -> tuple[str | None, str]:
    """The interpreter that can import `modules`, or None; and the reason if None.

    Raises:
        ValueError: `KVJAX_TORCH_PYTHON` does not name an executable.
    """
    named = os.environ.get(VARIABLE)
    python = named or sys.executable
    if named and shutil.which(named) is None:
        raise ValueError(
            f"{VARIABLE}={named!r} is not an executable; expected a Python interpreter "
            f"with {', '.join(modules)}. Correct or unset it."
        )
    missing = _missing(python, tuple(modules))
    if not missing:
        return python, ""
    where = f"the interpreter in {VARIABLE}" if named else "this interpreter"
    return None, (
        f"{where} lacks {', '.join(missing)}; set {VARIABLE} to one that has "
        f"{', '.join(modules)}"
    )


def run_reference(
    script: str,
    *args: str | os.PathLike[str],
    modules: Sequence[str] = MODULES,
    timeout: float = 600,
) -> str:
    """Standard output of `tests/<script>` run in the PyTorch interpreter.

    Args:
        script: file name in this folder.
        args: its command line.
        modules: what the script imports.
        timeout: seconds.

    Raises:
        RuntimeError: no interpreter has the modules, or the script failed; call
            `find_torch_python` first to skip instead.
    """
    python, reason = find_torch_python(modules)
    if python is None:
        raise RuntimeError(f"Cannot run {script}: {reason}.")
    # The script's process must not see this interpreter's packages.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [python, str(HERE / script), *(str(arg) for arg in args)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{script} failed ({done.returncode}):\n{done.stderr}")
    return done.stdout


def kvpress_reference(
    folder: pathlib.Path,
) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
    """A small Hugging Face Llama in `folder`, and what kvpress keeps of its cache.

    The layout of the arrays is in the docstring of `kvpress_reference.py`.
    """
    model, data = folder / "model", folder / "kvpress.npz"
    run_reference("kvpress_reference.py", data, "--save-model", model)
    with np.load(data) as file:
        return model, dict(file)
