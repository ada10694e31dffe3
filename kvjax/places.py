"""Paths that are given: what is there, whether it can be written, and who does."""

import contextlib
import fcntl
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import Any

from kvjax.messages import shown
from kvjax.plaintext import SURROGATE

ELSEWHERE = "Give another directory with --out"


def expanded(name: str | os.PathLike[str]) -> pathlib.Path:
    """A path that somebody gave, `~` as their home; never raises."""
    return pathlib.Path(os.path.expanduser(name))


def cache_folder() -> pathlib.Path | None:
    """What can be had again is kept here: `KVJAX_CACHE_DIR`, or the user's cache.

    None where that is in a home that nobody has.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    own = os.environ.get("KVJAX_CACHE_DIR") or os.path.join(base, "kvjax")
    folder = expanded(own)
    return None if own.startswith("~") and not folder.is_absolute() else folder


def given_path(name: Any, wanted: str = "the path of a directory") -> pathlib.Path:
    """`expanded` of a path that a caller gave, if it is one.

    Args:
        name: what was given.
        wanted: what should have been, for the message.

    Raises:
        ValueError: no path, an empty one, or one that is no text.
    """
    try:
        text = os.fspath(name) if isinstance(name, str | os.PathLike) else None
    except TypeError:  # of a `__fspath__` that gives something else
        text = None
    if not isinstance(text, str) or not text:
        raise ValueError(f"Expected {wanted}; got {shown(name)}.")
    if SURROGATE.search(text):
        raise ValueError(
            f"Expected {wanted}; got {shown(text)}, a name that is not UTF-8, which "
            "libraries of weights and tokenizers do not take. Rename it."
        )
    return expanded(text)


def check_place(directory: pathlib.Path, remedy: str = f"{ELSEWHERE}.") -> None:
    """`directory` can be written to, or can be made. Nothing is made or changed.

    Args:
        directory: the place.
        remedy: the end of what is raised.

    Raises:
        ValueError: a file is there or above it, a link leads nowhere, a name is too
            long, or nothing may be written there.
    """
    path = directory.absolute()
    for one in (path, *path.parents):
        try:
            mode = one.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            if one.is_symlink():
                why = f"{shown(str(one))} is a link to nowhere"
                raise _no_place(directory, remedy, why) from None
            continue
        except (OSError, ValueError) as wrong:  # ValueError: a name with NUL in it
            code = wrong.errno if isinstance(wrong, OSError) else None
            why = os.strerror(code) if code else str(wrong)
            raise _no_place(directory, remedy, why) from None
        if not stat.S_ISDIR(mode):
            raise _no_place(directory, remedy, f"{shown(str(one))} is a file")
        if not os.access(one, os.W_OK | os.X_OK):
            raise _no_place(
                directory, remedy, f"nothing may be written to {shown(str(one))}"
            )
        _check_names(directory, path.relative_to(one), one, remedy)
        return


def _check_names(
    directory: pathlib.Path, new: pathlib.Path, above: pathlib.Path, remedy: str
) -> None:
    """The names that are to be made below `above` are not too long for its disk."""
    most = os.pathconf(above, "PC_NAME_MAX")
    for name in new.parts:
        if len(os.fsencode(name)) > most:
            raise _no_place(directory, remedy, f"a name has more than {most} bytes")
        if name == "..":
            raise _no_place(
                directory, remedy, "`..` is below a directory that is not there"
            )


def _no_place(directory: pathlib.Path, remedy: str, why: str) -> ValueError:
    return ValueError(
        f"{shown(str(directory))} cannot be written to as a directory: {why}. {remedy}"
    )


@contextlib.contextmanager
def held(directory: pathlib.Path) -> Iterator[bool]:
    """Whether this process alone writes to `directory` while inside.

    The directory is made; what was made is removed again if nothing has been put there.
    The directory itself is locked, by the kernel, which lets go of it at the end of a
    process, a kill included: there is no file of the lock.

    Raises:
        OSError: it cannot be made or written to.
    """
    made = [one for one in (directory, *directory.parents) if not one.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):  # the first that is not empty
            for one in made:
                one.rmdir()


def busy(directory: pathlib.Path) -> ValueError:
    """Another process holds the directory."""
    return ValueError(
        f"another run is writing to {directory}. Wait for it or stop it, or give "
        "another directory with --out."
    )


def clear_left(*directories: pathlib.Path) -> None:
    """Remove what killed writers left; of directories that this process holds."""
    for directory in directories:
        for path in directory.glob(".*.tmp"):
            path.unlink(missing_ok=True)
