"""A program that prints JSON records, read as it prints them and ended on time."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any


def records(
    command: Sequence[str],
    *,
    silent: float,
    said: IO[Any],
    until: float = float("inf"),
    environment: Mapping[str, str] | None = None,
) -> Iterator[dict[str, Any]]:
    """What a command prints, line by line, and at last how it ended.

    It is ended, with all that it started, when it prints no record for too long. Lines
    that are no JSON object are a compiler's own words and are left out.

    Args:
        command: to run.
        silent: seconds without a record after which it is ended; a record may set
            other ones under `silent`.
        said: file for what it prints to the standard error.
        until: `time.monotonic()` at which it is ended in any case.
        environment: of the command; None: this one's.

    Yields:
        Its records, then `{"end": reason, "code": exit code}`; the reason is `over`
        where it ended by itself, else `silent` or `time`.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=said,
        text=True,
        env=environment,
        start_new_session=True,
    )
    lines: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
    reader.start()
    end = ""
    try:
        quiet = time.monotonic() + silent
        while True:
            wait = min(quiet, until) - time.monotonic()
            try:
                line = lines.get(timeout=max(0.0, wait))
            except queue.Empty:
                end = "time" if until <= quiet else "silent"
                break
            if line is None:
                end = "over"
                break
            record = _record(line)
            if record is not None:
                yield record
                silent = record.get("silent", silent)
                quiet = time.monotonic() + silent
    finally:
        code = _ended(process, patience=10.0 if end == "over" else 0.0)
        reader.join(timeout=5)
    yield {"end": end, "code": code}


def _ended(process: subprocess.Popen, patience: float) -> int:
    """Exit code; what it started is ended too, and could hold its output open."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        if patience:
            process.wait(timeout=patience)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _read(stream: IO[str] | None, lines: "queue.Queue[str | None]") -> None:
    assert stream is not None
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
