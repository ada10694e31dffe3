"""Ctrl-C and SIGTERM that wait for the end of a step."""

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
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """What it gives says whether a signal to stop came; a second one is raised at once.

    SIGINT is Ctrl-C, SIGTERM what schedulers send before they take a machine away. A
    step donates its state: interrupted in the middle, there is none to save. Outside
    the main thread, and for a signal that is somebody else's, nothing changes.
    """
    asked = False

    def note(signum: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        print(
            "stopping at the end of this step; once more to lose it",
            file=sys.stderr,
            flush=True,
        )

    ours = {}
    if threading.current_thread() is threading.main_thread():
        ours = {s: h for s, h in DEFAULTS.items() if signal.getsignal(s) is h}
    for number in ours:
        signal.signal(number, note)
    try:
        yield lambda: asked
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
