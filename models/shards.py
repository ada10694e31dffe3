"""Checkpoint files: which tensor is in which file, read in pieces, written in pieces.

Nothing here holds more than a few megabytes. A file's header is checked by safetensors;
pieces are read by their place in the file, since its NumPy side knows no 8-bit floats.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
import safetensors

from kvjax.files import parse_json, read_json, regular
from kvjax.messages import nearest
from kvjax.plaintext import decoded

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SAVE = "kvjax_save"
"""Number of a save, in `config.json` and in the metadata of its weights."""
_UNMARKED = 16 * "?"
CHUNK_BYTES = 4 * 2**20

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
"""Dtypes of safetensors that can be read."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_EXPONENT = {  # all ones in the exponent: Inf or NaN
    "float64": (np.uint64, 0x7FF0_0000_0000_0000),
    "float32": (np.uint32, 0x7F80_0000),
    "float16": (np.uint16, 0x7C00),
    "bfloat16": (np.uint16, 0x7F80),
}
PLAIN = tuple(_EXPONENT)
"""Dtypes of weights that are no codes of a quantisation."""


@runtime_checkable
class Source(Protocol):
    """Tensors by name, as `Shards` has them or made from what it has."""

    place: pathlib.Path
    """The file that says which tensors there are."""
    files: dict[str, pathlib.Path]
    shapes: dict[str, tuple[int, ...]]

    def rows(self, name: str, start: int, stop: int) -> Iterator[np.ndarray]:
        """Rows `start:stop` of a tensor, some at a time."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor's place: its file, and where its bytes start there."""

    path: pathlib.Path
    kind: str
    shape: tuple[int, ...]
    start: int


def finite(array: np.ndarray) -> bool:
    """No NaN and no Inf; looks at the exponent bits, which is fast for bfloat16 too."""
    integer, mask = _EXPONENT[array.dtype.name]
    bits = np.ascontiguousarray(array).view(integer)
    return not bool(np.any((bits & integer(mask)) == mask))


class Shards:
    """The tensors of a checkpoint directory, or of one file.

    Raises:
        ValueError: no weights, a missing or damaged shard, a tensor that is in two
            files, or an index that names a file outside the directory.
    """

    def __init__(self, where: pathlib.Path):
        self.place, table = (where, {}) if where.is_file() else _locate(where)
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[pathlib.Path, dict[str, str]] = {}
        for path in dict.fromkeys(table.values()) or [self.place]:
            entries, self.metadata[path] = _header(path)
            for name, entry in entries.items():
                other = self.entries.get(name)
                if other is not None or table.get(name, path) != path:
                    other = table[name] if other is None else other.path
                    raise ValueError(
                        f"Tensor {name!r:.200} is in {path} and in {other}. Keep one "
                        f"of them, or save the checkpoint again."
                    )
                self.entries[name] = entry
        lost = sorted(name for name in table if name not in self.entries)
        if lost:
            raise ValueError(
                f"{self.place} places {lost[0]!r:.200} in {table[lost[0]]}, which "
                f"lacks it."
            )
        self.files = {name: entry.path for name, entry in self.entries.items()}
        self.shapes = {name: entry.shape for name, entry in self.entries.items()}

    def rows(self, name: str, start: int, stop: int) -> Iterator[np.ndarray]:
        """Rows `start:stop` of a tensor, `CHUNK_BYTES` at a time."""
        row = self.shapes[name][1:]
        width = math.prod(row) * DTYPES[self.entries[name].kind].itemsize
        step = max(1, CHUNK_BYTES // max(width, 1))
        for first in range(start, stop, step):
            count = min(first + step, stop) - first
            yield self._read(name, first * width, count * width).reshape(count, *row)

    def whole(self, name: str) -> np.ndarray:
        """A tensor that is known to be small."""
        shape = self.shapes[name]
        size = math.prod(shape) * DTYPES[self.entries[name].kind].itemsize
        return self._read(name, 0, size).reshape(shape)

    def _read(self, name: str, start: int, size: int) -> np.ndarray:
        entry = self.entries[name]
        with entry.path.open("rb") as file:
            file.seek(entry.start + start)
            raw = np.frombuffer(file.read(size), np.uint8)
        if len(raw) != size:
            raise ValueError(
                f"{entry.path} ended while tensor {name!r:.200} was read. Something "
                f"else writes to it; load it when that is done."
            )
        return raw.view(DTYPES[entry.kind])


def _header(path: pathlib.Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """A file's tensors and metadata, after safetensors found that all bytes fit."""
    regular(path)
    try:
        with safetensors.safe_open(str(path), framework="np") as handle:
            metadata = handle.metadata() or {}
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = parse_json(decoded(file.read(size), "the header"), "the header")
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({str(error):.300}). It may be "
            f"cut off; download or copy it again."
        ) from error
    header.pop("__metadata__", None)
    entries = {
        name: Entry(
            path=path,
            kind=str(held["dtype"]),
            shape=tuple(held["shape"]),
            start=8 + size + held["data_offsets"][0],
        )
        for name, held in header.items()
    }
    return entries, metadata


def write_safetensors(
    path: pathlib.Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    pieces,
    total: Any,
) -> None:
    """One safetensors file, written piece by piece; see `mark` for its number.

    Args:
        path: the file.
        tensors: name to shape and dtype, in file order.
        pieces: `name -> Iterator[np.ndarray]`, the tensor's rows in order.
        total: a hash that is told all bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", SAVE: _UNMARKED}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        begin, end = end, end + int(np.prod(shape)) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in tensors:
            for piece in pieces(name):
                data = np.ascontiguousarray(piece).view(np.uint8).data
                total.update(data)
                file.write(data)
        if file.tell() != 8 + len(text) + end:
            raise AssertionError(f"{path}: pieces do not fill their tensors")


def mark(path: pathlib.Path, number: str) -> None:
    """Put the number of its save, of 16 characters, into a file's header."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        at = 8 + file.read(size).index(_UNMARKED.encode())
        file.seek(at)
        file.write(number.encode())


def check_save(shards: Shards, config: Mapping[str, Any]) -> None:
    """Weights and `config.json` are of one save; those of others carry no number.

    Raises:
        ValueError: a save was killed between its files.
    """
    for path in dict.fromkeys(shards.files.values()):
        number = shards.metadata[path].get(SAVE)
        if number is not None and number != config.get(SAVE):
            raise ValueError(
                f"{path} and the config.json beside it are of two saves: one was "
                "killed while it replaced the other. Save the model there again "
                "(`kvjax convert --overwrite`, or the command of the run behind it)."
            )


def placed(directory: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold a directory's weights, and what names them.

    Of an index, only what it names in the directory itself; a damaged one names none.
    """
    found = [directory / SINGLE, directory / INDEX]
    with contextlib.suppress(ValueError):
        table = read_json(directory / INDEX).get("weight_map")
        for file in table.values() if isinstance(table, dict) else ():
            with contextlib.suppress(ValueError):
                found.append(_inside(directory, file))
    return [path for path in dict.fromkeys(found) if path.is_file()]


def _locate(directory: pathlib.Path) -> tuple[pathlib.Path, dict[str, pathlib.Path]]:
    """The single file, or the index and what it says."""
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():
        return single, {}
    if index.is_file():
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise ValueError(f"{index} has no `weight_map` from tensors to files.")
        return index, {name: _inside(directory, file) for name, file in table.items()}
    found = sorted(p.name for p in directory.iterdir() if p.is_file())
    if any(name.endswith((".bin", ".pt", ".pth")) for name in found):
        raise ValueError(
            f"{directory} holds pickled weights ({found[:20]}), which can run code "
            f"when loaded. Convert them to safetensors first."
        )
    hint = nearest(SINGLE, found)
    raise ValueError(
        f"{directory} has neither {SINGLE} nor {INDEX}; got {found[:20]}.{hint}"
    )


def _inside(directory: pathlib.Path, file: object) -> pathlib.Path:
    name = file if isinstance(file, str) else ""
    plain = pathlib.PurePath(name).name == name and "\\" not in name
    if not plain or not 0 < len(name) < 256:
        raise ValueError(
            f"{directory / INDEX} names {file!r:.200}; shards must lie in the "
            f"directory itself, without a path."
        )
    path = directory / name
    if not path.is_file():
        raise ValueError(
            f"Shard {path} is missing; {INDEX} names it. Download the checkpoint again."
        )
    return path
