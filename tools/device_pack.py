"""Collects what `make device` imports beside JAX, for a machine without a network.

    make device-pack

Wheels of the locked versions, for CPython 3.12 on Linux x86-64, with their hashes, into
`.wheels/`, which git ignores and `make device` installs from. JAX and what it needs is
left out: whoever has a GPU to measure on has that.
"""

import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import device_python
from packaging.requirements import Requirement

ROOT = device_python.ROOT
LOCK = ROOT / "requirements.lock"
MOST_BYTES = 64 << 20
WITH_JAX = {"jax", "jaxlib", "numpy", "scipy", "ml-dtypes", "opt-einsum"}
TARGET = {
    "python_version": "3.12",
    "python_full_version": "3.12.0",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "platform_machine": "x86_64",
    "platform_system": "Linux",
    "sys_platform": "linux",
    "os_name": "posix",
}
PLATFORMS = [
    *(f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 26, 24, 17, 12, 5)),
    "manylinux2014_x86_64",
    "manylinux2010_x86_64",
    "manylinux1_x86_64",
]


def normal(name: str) -> str:
    """A distribution's name as the lock writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(names: list[str]) -> list[str]:
    """Distributions that `names` need on the target, less what comes with JAX."""
    found: set[str] = set()
    left = [(normal(name), frozenset[str]()) for name in names]
    seen = set()
    while left:
        one = left.pop()
        name, extras = one
        if one in seen or name in WITH_JAX:
            continue
        seen.add(one)
        found.add(name)
        for text in importlib.metadata.requires(name) or ():
            need = Requirement(text)
            wanted = [{**TARGET, "extra": extra} for extra in ("", *extras)]
            if need.marker is None or any(map(need.marker.evaluate, wanted)):
                left.append((normal(need.name), frozenset(need.extras)))
    return sorted(found)


def locked(names: list[str]) -> str:
    """Their entries in the lock: pins and hashes.

    Raises:
        ValueError: the lock does not have one.
    """
    text = LOCK.read_text(encoding="utf-8")
    entries = {
        entry.split("==")[0]: entry for entry in re.split(r"\n(?=\S)", text.strip())
    }
    absent = [name for name in names if name not in entries]
    if absent:
        raise ValueError(f"requirements.lock has no {absent}; run `make lock`.")
    return "\n".join(entries[name] for name in names) + "\n"


def download(requirements: str, folder: pathlib.Path) -> bool:
    """Fetch the wheels; True when pip managed."""
    listed = folder / "requirements.txt"
    listed.write_text(requirements, encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    pip += ["--only-binary=:all:", "--require-hashes", "-r", str(listed)]
    pip += ["--python-version", "3.12", "--implementation", "cp", "-d", str(folder)]
    for platform in PLATFORMS:
        pip += ["--platform", platform]
    done = subprocess.run(pip, stdin=subprocess.DEVNULL)
    listed.unlink()
    return done.returncode == 0


def main() -> int:
    """Collect, and say how much it is."""
    names = closure(list(device_python.NEEDED.values()))
    with tempfile.TemporaryDirectory(dir=ROOT) as draft:
        folder = pathlib.Path(draft) / "wheels"
        folder.mkdir()
        if not download(locked(names), folder):
            print("error: the wheels could not be fetched; see above.", file=sys.stderr)
            return 1
        size = sum(path.stat().st_size for path in folder.iterdir())
        if size > MOST_BYTES:
            print(f"error: {size >> 20} MiB of wheels, 64 may travel.", file=sys.stderr)
            return 1
        shutil.rmtree(device_python.WHEELS, ignore_errors=True)
        folder.rename(device_python.WHEELS)
    print(f"device-pack: {len(names)} wheels, {size / (1 << 20):.1f} MiB, in .wheels/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
