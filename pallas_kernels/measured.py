"""What compilers tell about the memory of a kernel, found in what they print."""

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Iterator

DUMP = "MOSAIC_GPU_DUMP_TO"
"""Variable that names the folder which Mosaic GPU writes its stages to."""


def vmem_bytes(text: str) -> int | None:
    """VMEM of the largest kernel, from the text of a compiled TPU program."""
    sizes = []
    for line in text.splitlines():
        if 'custom_call_target="tpu_custom_call"' not in line:
            continue
        for used in re.findall(r'"used_scoped_memory_configs":(\[.*?\])', line):
            spaces = [c for c in json.loads(used) if c["memory_space"] == "1"]
            sizes.append(sum(int(c["size"]) for c in spaces))
    return max(sizes, default=None)


@contextlib.contextmanager
def emptied_dump() -> Iterator[pathlib.Path | None]:
    """The folder that Mosaic GPU dumps to, without what earlier programs left."""
    folder = pathlib.Path(os.environ[DUMP]) if os.environ.get(DUMP) else None
    for path in folder.iterdir() if folder else ():
        path.unlink()
    yield folder


def read_dump(folder: pathlib.Path | None) -> dict[str, int]:
    """Shared memory, registers and spills of the worst kernel that was dumped."""
    found: dict[str, int] = {}

    def note(name: str, pattern: str, text: str) -> None:
        for size in re.findall(pattern, text):
            found[name] = max(found.get(name, 0), int(size))

    for path in sorted(folder.iterdir()) if folder else ():
        if path.name.endswith(".txt"):
            text = path.read_text(errors="replace")
            launch = r"dynamic_shared_memory_size %c(\d+)_i32"
            note("onchip_bytes", launch, text)
            # Where the launch names no constant: without the barriers.
            note("onchip_bytes", r"smem_scratch_bytes=(\d+)", text)
        elif path.suffix == ".ptxas":
            text = path.read_text(errors="replace")
            note("registers", r"Used (\d+) registers", text)
            note("spill_bytes", r"(\d+) bytes spill stores", text)
    return found


def one_line(error: BaseException) -> str:
    """First line of an error, and how much memory was missing if that was it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    missing = re.search(r"Scoped allocation with size .*? by [\d.]+\w", str(error))
    text = f"{first} {missing.group()}" if missing else first
    return text if len(text) <= 300 else text[:297] + "..."
