"""Signals to stop that are noted: acted on where there is something to save."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

DEFAULTS: Mapping[signal.Signals, Any] = MappingProxyType(
    {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }
)
"""Signals that stop a run, and the handlers that say nobody else wants them."""


@contextlib.contextmanager
def noted_interrupt(
    *signals: signal.Signals, deferred: str = ""
) -> Iterator[Callable[[], bool]]:
    """What it gives says whether one of the signals came.

    Each raises `KeyboardInterrupt`, too. That alone can be lost: Python swallows what a
    signal raises inside a finalizer, of which compiling runs many. Outside the main
    thread, and for a signal that is somebody else's, nothing changes.

    Args:
        *signals: some of `DEFAULTS`: SIGINT is Ctrl-C, SIGTERM what schedulers send
            before they take a machine away.
        deferred: said of the first signal instead of raising it; only another one is
            then raised.
    """
    asked = False

    def note(signum: int, frame: Any) -> None:
        nonlocal asked
        if asked or not deferred:
            asked = True
            raise KeyboardInterrupt
        asked = True
        print(deferred, file=sys.stderr, flush=True)

    ours = {}
    if threading.current_thread() is threading.main_thread():
        ours = {s: DEFAULTS[s] for s in signals if signal.getsignal(s) is DEFAULTS[s]}
    for number in ours:
        signal.signal(number, note)
    try:
        yield lambda: asked
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
