"""What a run reads, by digests: whether a file is still what it was when it began.

`Inputs` has a mapping for everything that a run is given by name (a data set, a
checkpoint, a compression): from the files of it to `DIGEST SIZE-MTIME-CTIME`. A file
whose size and times are as they were is not read again.
"""

import hashlib
import os
import pathlib
import time
from collections.abc import Iterable, Mapping

from kvjax.files import digest, regular
from kvjax.places import ELSEWHERE

Inputs = dict[str, dict[str, str]]

MOST_FILES = 1000
"""Of one input; more of them have one digest together."""

YOUNG_NS = 100_000_000
"""A file that is younger may change without its times: clocks of disks are coarse."""

_UNREAD = "-"


def stamp(file: pathlib.Path) -> str:
    """Size and times of a file; empty where they are too young to tell."""
    found = regular(file).stat()
    if time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) < YOUNG_NS:
        return ""
    return f"{found.st_size}-{found.st_mtime_ns}-{found.st_ctime_ns}"


def of_files(files: Mapping[str, pathlib.Path], known: Mapping[str, str]) -> dict:
    """The digests of files by name.

    Args:
        files: by the names that messages give them.
        known: what an earlier call made of them; what it stamped is not read again.

    Raises:
        ValueError: one cannot be read.
    """
    if len(files) > MOST_FILES:
        name, stamps = f"{len(files)} files", [*map(stamp, files.values())]
        together = "" if "" in stamps else _sha(zip(files, stamps, strict=True))
        if held := _held(known.get(name, ""), together):
            return {name: held}
        each = ((one, digest(file)) for one, file in files.items())
        return {name: _entry(_sha(each), together)}
    made = {}
    for name, file in files.items():
        mark = stamp(file)  # before it is read: a change from here on is seen
        made[name] = _held(known.get(name, ""), mark) or _entry(digest(file), mark)
    return made


def of_stamps(files: Mapping[str, pathlib.Path]) -> dict[str, str]:
    """Sizes and times alone, of what something else looks into."""
    return {name: _entry(_UNREAD, stamp(file)) for name, file in files.items()}


def of_text(name: str, text: str) -> dict[str, str]:
    """The digest of what something means."""
    return {name: hashlib.sha256(text.encode()).hexdigest()}


def _held(entry: str, mark: str) -> str:
    """The entry, if it is of what is there."""
    return entry if mark and entry.partition(" ")[2] == mark else ""


def _entry(digest: str, mark: str) -> str:
    return f"{digest} {mark}".rstrip()


def _sha(pairs: Iterable[tuple[str, str]]) -> str:
    total = hashlib.sha256()
    for name, value in pairs:
        total.update(f"{name}\0{value}\0".encode(errors="surrogateescape"))
    return total.hexdigest()


def untouched(old: Mapping[str, str], new: Mapping[str, str]) -> bool:
    """Whether sizes and times of all files are known and the same."""
    return bool(new) and old == new and all(" " in one for one in new.values())


def check_same(old: Inputs, new: Inputs) -> None:
    """Inputs that both know are the same.

    Raises:
        ValueError: names the first file that has changed, has gone or is new.
    """
    for label in [label for label in new if label in old]:
        before, now = old[label], new[label]
        for name in dict.fromkeys([*now, *before]):
            then, here = before.get(name), now.get(name)
            if None in (then, here):
                what = "is new" if then is None else "has gone"
                raise ValueError(f"{label}: {name} {what} since this run began. {_DO}")
            assert then is not None and here is not None
            if then.split()[0] != here.split()[0]:
                raise ValueError(
                    f"{label}: {name} has changed since this run began (digest "
                    f"{then[:12]} then, {here[:12]} now). {_DO}"
                )


_DO = f"{ELSEWHERE}, or put back what was there."


SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja")
"""Of the files of a checkpoint."""

TEMPLATES = "additional_chat_templates"
"""Folder of a checkpoint's chat templates beside its first."""


def checkpoint_files(
    name: str, directory: str | os.PathLike[str]
) -> dict[str, pathlib.Path]:
    """The files of a checkpoint, by `name/FILE`, its further templates among them.

    One that is a file itself is `name`.
    """
    folder = pathlib.Path(directory)
    if folder.is_file():
        return {name: folder}
    found = sorted([*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*")])
    files = [one for one in found if one.suffix in SUFFIXES and one.is_file()]
    return {f"{name}/{one.relative_to(folder)}": one for one in files}
