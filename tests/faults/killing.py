"""A process that dies at a chosen call to the file system, without dying."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


class Killed(BaseException):
    """Nothing that handles errors handles this one."""


class _Killer:
    """Counts calls below a directory; from the chosen one on, all of them fail.

    What cleans up behind an error thus has nothing to clean up with, as behind a kill.
    """

    def __init__(self) -> None:
        self.below: str | None = None
        self.left = self.seen = 0

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.below is None or event not in EVENTS:
            return
        paths = [
            os.fspath(one) for one in args[:2] if isinstance(one, str | os.PathLike)
        ]
        if not any(str(path).startswith(self.below) for path in paths):
            return
        self.seen += 1
        self.left -= 1
        if self.left < 0:
            raise Killed


_KILLER: list[_Killer] = []


@contextlib.contextmanager
def killed_at(call: int, below: pathlib.Path) -> Iterator[_Killer]:
    """Die at that call, counted from 0, to the file system below a directory."""
    if not _KILLER:  # a hook stays for as long as the process
        _KILLER.append(_Killer())
        sys.addaudithook(_KILLER[0])
    killer = _KILLER[0]
    killer.below, killer.left, killer.seen = str(below), call, 0
    try:
        yield killer
    finally:
        killer.below = None


def calls(below: pathlib.Path, act: Callable[[], Any]) -> int:
    """How many calls `act` makes."""
    with killed_at(1 << 60, below) as killer:
        act()
    return killer.seen
