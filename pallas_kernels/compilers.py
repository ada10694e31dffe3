"""The compilers of chips that are not here, each in a process of its own.

What a compiler wants in its environment has to be set before JAX is imported, and its
wheels should not be where JAX is used otherwise. `ask` starts `python -m` a module that
ends in `answer`; the real compiler runs there, and nothing is executed.
"""

import importlib.resources
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from kvjax.messages import nearest
from kvjax.pallas_kernels.measured import one_line
from kvjax.pallas_kernels.targets import TARGETS, Target

COMPILERS = {"tpu": ("libtpu", "tpu"), "cuda": ("jax_cuda13_plugin", "cuda13")}
"""By family: the module that holds the compiler, and the extra that installs it."""


def target_of(device: str) -> Target:
    """The chip of a name.

    Raises:
        ValueError: it is not known; the nearest is named.
    """
    if device not in TARGETS:
        raise ValueError(
            f"Unknown device {device!r}; expected one of {[*TARGETS]}."
            f"{nearest(device, TARGETS)}"
        )
    return TARGETS[device]


def interpreter(target: Target) -> str:
    """The Python that holds the compiler of a chip.

    `KVJAX_TPU_PYTHON` or `KVJAX_CUDA_PYTHON`, else this one.

    Raises:
        ValueError: this one has no such compiler; says which extra installs it.
    """
    module, extra = COMPILERS[target.family]
    if given := os.environ.get(_variable(target)):
        return given
    if importlib.util.find_spec(module) is None:
        raise ValueError(
            f"compiling for {target.name} needs {module}, which is not installed: "
            f"pip install 'kvjax[{extra}]', best into an environment of its own, and "
            f"name its Python in {_variable(target)}."
        )
    return sys.executable


def _variable(target: Target) -> str:
    return f"KVJAX_{target.family.upper()}_PYTHON"


def ask(
    module: str,
    target: Target,
    request: dict[str, Any],
    heard: Callable[[dict[str, Any]], None],
) -> None:
    """A module run in a process that holds the compiler of a chip.

    Args:
        module: reads `request` as JSON, prints records, and ends with 0, or with 1
            behind a record `{"wrong": why}`.
        target: the chip.
        request: what it is asked.
        heard: called with each record.

    Raises:
        ValueError: no compiler, what the module calls wrong, or a process that ended
            without a word.
    """
    wrong: list[str] = []

    def listen(record: dict[str, Any]) -> None:
        wrong.extend([record["wrong"]] if "wrong" in record else [])
        heard(record)

    code, said = _run(interpreter(target), module, target, request, listen)
    if wrong:
        raise ValueError(wrong[0])
    if code:
        last = [line for line in said.splitlines() if line.strip()][-1:]
        raise ValueError(
            f"the process that compiles for {target.name} ended with code {code}: "
            f"{last[0] if last else 'it said nothing'}. {_variable(target)} names "
            "another Python, with kvjax's dependencies and the compiler."
        )


def _run(
    python: str,
    module: str,
    target: Target,
    request: dict[str, Any],
    heard: Callable[[dict[str, Any]], None],
) -> tuple[int, str]:
    """Exit code of the process that compiles, and what it said beside its records."""
    command = [python, "-m", module]
    environment = {**os.environ, **target.environment, "PYTHONPATH": _path()}
    with tempfile.TemporaryFile("w+") as asked, tempfile.TemporaryFile("w+") as said:
        json.dump(request, asked)
        asked.seek(0)
        try:
            process = subprocess.Popen(
                command,
                stdin=asked,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                errors="replace",
                env=environment,
            )
        except OSError as wrong:
            raise ValueError(
                f"{python}, the Python that compiles for {target.name}, cannot be "
                f"started: {wrong}. {_variable(target)} names another."
            ) from None
        with process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    if record := _record(line):
                        heard(record)
            except BaseException:
                process.kill()  # or leaving would wait for all that is to be compiled
                raise
        said.seek(0)
        return process.returncode, said.read()


def _record(line: str) -> dict[str, Any]:
    """What a line says; empty, if it is a compiler's own words."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _path() -> str:
    """Where another interpreter finds this kvjax, and what this one was told."""
    own = os.path.dirname(str(importlib.resources.files("kvjax")))
    return os.pathsep.join(filter(None, [own, os.environ.get("PYTHONPATH")]))


def answer(records: Callable[[dict[str, Any]], Iterator[dict[str, Any]]]) -> int:
    """The other side of `ask`: exit code of a process that prints records.

    Args:
        records: of a request, which is read from stdin; a `ValueError` of it is what
            the caller raises.
    """
    request = json.load(sys.stdin)
    try:
        for record in records(request):
            print(json.dumps(record), flush=True)
    except ValueError as wrong:
        print(json.dumps({"wrong": str(wrong)}), flush=True)
        return 1
    return 0


def refusal(error: Exception) -> tuple[str, str, int | None]:
    """Status, reason and, where it is said, the bytes of what was not compiled.

    The status is "too large" where there was no way to fit, else "failed".
    """
    full = re.search(r"RESOURCE_EXHAUSTED|Ran out of memory", str(error))
    total = used(str(error)) if full else None
    return "too large" if full else "failed", one_line(error), total


def needed(memory: Any) -> int:
    """Bytes that a program needs at once, by `memory_analysis`.

    What takes the place of an argument counts once.
    """
    own = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + own + memory.temp_size_in_bytes


def used(said: str) -> int | None:
    """Bytes that a compiler would have needed, where it says so.

    Arguments and results count, too, in what it calls temporaries.
    """
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", said) or re.search(
        r"total memory required for HLO temporaries \(([\d.]+)([KMGT])\)", said
    )
    return int(float(found[1]) * units[found[2]]) if found else None
