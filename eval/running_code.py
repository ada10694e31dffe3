"""Runs programs that a model wrote, and says whether they pass their tests.

Each runs in a fresh interpreter: a process group and session of its own, an empty
environment, a temporary folder, limits of time, memory, files and processes; without a
network where the kernel can make such a place; with an audit hook that refuses sockets,
other processes and changes to files elsewhere. This guards against accidents. It is no
jail: a program that means to break out may. Run models that you do not trust in a
container or a virtual machine.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time

GUARD = pathlib.Path(__file__).with_name("code_guard.py")
MOST_SAID = 4096
"""Bytes of what is said about a program."""
GRACE = 20.0
"""Seconds that the guard has to start and to clear up, beyond those of the program."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        passed: whether it ran to its end.
        why: if not: `time`, `memory`, `assertion`, `exit` (it left before its end),
            `syntax: ...`, `refused: ...`, `error: TypeError: ...`, `signal 11`.
    """

    passed: bool
    why: str = ""


def run_code(
    program: str,
    *,
    seconds: float = 5.0,
    memory: int = 2**29,
    file_size: int = 2**20,
) -> Outcome:
    """Whether a Python program, its tests included, runs to its end.

    It has passed only if it says a random word behind its last line, so that a program
    which leaves early has not. What it prints is thrown away.

    Args:
        program: the source.
        seconds: on the clock and of the processor.
        memory: bytes of address space.
        file_size: bytes of the largest file.
    """
    token = secrets.token_hex(16)
    reader, writer = os.pipe()
    request = {
        "program": program,
        "token": token,
        "seconds": seconds,
        "memory": memory,
        "file_size": file_size,
        "result": writer,
    }
    try:
        with tempfile.TemporaryDirectory(
            prefix="kvjax-code-", ignore_cleanup_errors=True
        ) as folder:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-X", "utf8", str(GUARD.resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={},
                pass_fds=(writer,),
                start_new_session=True,
            )
            try:
                said = _said(process, request, reader, seconds + GRACE)
            finally:
                _end(process)
    finally:
        os.close(reader)
        os.close(writer)
    return _outcome(said, token)


@functools.cache
def cannot_run() -> str:
    """Why no program can be run here; empty: programs can."""
    return run_code("import math", seconds=30.0).why


def _said(process: subprocess.Popen, request: dict, reader: int, seconds: float) -> str:
    """The first line that comes, as far as it is not too long."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as file:
        file.write(json.dumps(request).encode())
    end, found = time.monotonic() + seconds, b""
    watch = selectors.DefaultSelector()  # `select` takes no high descriptors
    watch.register(reader, selectors.EVENT_READ)
    while (left := end - time.monotonic()) > 0 and len(found) < MOST_SAID:
        # The pipe stays open here, so its end is not seen: look at the process too.
        if watch.select(min(left, 0.02)):
            found += os.read(reader, MOST_SAID)
            if b"\n" in found:
                break
        elif process.poll() is not None:
            break
    watch.close()
    if time.monotonic() >= end:
        return "time"
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, end - time.monotonic()))  # it clears up
    return found.decode(errors="replace").partition("\n")[0]


def _end(process: subprocess.Popen) -> None:
    """Kill the group, whoever is left of it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _outcome(said: str, token: str) -> Outcome:
    if said == f"passed {token}":
        return Outcome(True)
    return Outcome(False, said if said and not said.startswith("passed") else "exit")
