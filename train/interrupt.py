"""Ctrl-C that waits for the end of a step."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """What it gives says whether SIGINT came; the second one is raised at once.

    A step donates its state: interrupted in the middle, there is none to save. Outside
    the main thread, or where SIGINT is somebody else's, nothing changes.
    """
    asked = False

    def note(signum: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        print(
            "stopping at the end of this step; Ctrl-C again to lose it",
            file=sys.stderr,
            flush=True,
        )

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
