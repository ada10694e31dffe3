"""Checkpoint files: which tensor is in which file, read in pieces, written in pieces.

Nothing here holds more than a few megabytes. Files are opened for every piece, so that
the mapped pages of what was read are given back.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from kvjax.files import read_json
from kvjax.messages import nearest

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CHUNK_BYTES = 4 * 2**20

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_EXPONENT = {  # all ones in the exponent: Inf or NaN
    "float32": (np.uint32, 0x7F80_0000),
    "float16": (np.uint16, 0x7C00),
    "bfloat16": (np.uint16, 0x7F80),
}


def finite(array: np.ndarray) -> bool:
    """No NaN and no Inf; looks at the exponent bits, which is fast for bfloat16 too."""
    integer, mask = _EXPONENT[array.dtype.name]
    bits = np.ascontiguousarray(array).view(integer)
    return not bool(np.any((bits & integer(mask)) == mask))


class Shards:
    """The tensors of a checkpoint directory.

    Raises:
        ValueError: no weights, a missing or damaged shard, or an index that names a
            file outside the directory.
    """

    def __init__(self, directory: pathlib.Path):
        self.files = _locate(directory)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self.metadata: dict[pathlib.Path, dict[str, str]] = {}
        for path in dict.fromkeys(self.files.values()):
            self._scan(path)
        lost = sorted(name for name in self.files if name not in self.shapes)
        if lost:
            path = self.files[lost[0]]
            raise ValueError(f"The index places {lost[0]!r} in {path}, which lacks it.")

    def _scan(self, path: pathlib.Path) -> None:
        with _open(path) as handle:
            self.metadata[path] = handle.metadata() or {}
            for name in handle.keys():  # noqa: SIM118 (not a mapping)
                view = handle.get_slice(name)
                kind = view.get_dtype()
                if kind not in DTYPES:
                    raise ValueError(
                        f"Tensor {name!r} in {path} is {kind}; expected one of "
                        f"{sorted(DTYPES)}. Quantised checkpoints are not supported."
                    )
                if self.files.setdefault(name, path) != path:
                    continue  # the index takes it from another shard
                self.shapes[name] = tuple(view.get_shape())
                self.dtypes[name] = DTYPES[kind]

    def rows(self, name: str, start: int, stop: int) -> Iterator[np.ndarray]:
        """Rows `start:stop` of a tensor, `CHUNK_BYTES` at a time."""
        shape = self.shapes[name]
        width = int(np.prod(shape[1:])) * self.dtypes[name].itemsize
        step = max(1, CHUNK_BYTES // max(width, 1))
        for first in range(start, stop, step):
            with _open(self.files[name]) as handle:
                piece = handle.get_slice(name)[first : min(first + step, stop)]
            yield piece


def write_safetensors(
    path: pathlib.Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    pieces,
    metadata: Mapping[str, str],
) -> None:
    """One safetensors file, written piece by piece.

    Args:
        path: the file.
        tensors: name to shape and dtype, in file order.
        pieces: `name -> Iterator[np.ndarray]`, the tensor's rows in order.
        metadata: texts for the header.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
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
                file.write(np.ascontiguousarray(piece).view(np.uint8).data)
        if file.tell() != 8 + len(text) + end:
            raise AssertionError(f"{path}: pieces do not fill their tensors")


def _open(path: pathlib.Path):
    try:
        return safetensors.safe_open(str(path), framework="np")
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}). It may be cut off; "
            f"download or copy it again."
        ) from error


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


def _locate(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    single, index = directory / SINGLE, directory / INDEX
    if index.is_file() and not single.is_file():
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise ValueError(f"{index} has no `weight_map`.")
        return {name: _inside(directory, file) for name, file in table.items()}
    if single.is_file():
        with _open(single) as handle:
            return dict.fromkeys(handle.keys(), single)
    found = sorted(p.name for p in directory.iterdir() if p.is_file())
    if any(name.endswith((".bin", ".pt", ".pth")) for name in found):
        raise ValueError(
            f"{directory} holds pickled weights ({found}), which can run code when "
            f"loaded. Convert them to safetensors first."
        )
    hint = nearest(SINGLE, found)
    raise ValueError(
        f"{directory} has neither {SINGLE} nor {INDEX}; got {found}.{hint}"
    )


def _inside(directory: pathlib.Path, file: object) -> pathlib.Path:
    if not isinstance(file, str) or pathlib.PurePath(file).name != file or "\\" in file:
        raise ValueError(
            f"{directory / INDEX} names {file!r}; shards must lie in the directory "
            f"itself, without a path."
        )
    path = directory / file
    if not path.is_file():
        raise ValueError(
            f"Shard {path} is missing; {INDEX} names it. Download the checkpoint again."
        )
    return path
