"""Whether a file is still the one that was read."""

import os


def stamp(path: str) -> tuple[int, ...]:
    """Times and sizes of a file, or of a folder and what is in it; else nothing.

    What was read is kept under this and the path, so that a file that changes is read
    again.
    """
    try:
        files = [path]
        if os.path.isdir(path):
            files += sorted(one.path for one in os.scandir(path))
        found = [os.stat(file) for file in files]
    except (OSError, ValueError):  # ValueError: a name with NUL in it
        return ()
    return tuple(n for one in found for n in (one.st_mtime_ns, one.st_size))
