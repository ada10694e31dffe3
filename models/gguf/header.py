"""The header of a GGUF file: metadata and where its tensors are, all inside the file.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import math
import pathlib
import re
import struct
from collections.abc import Mapping
from typing import Any

from kvjax.files import regular
from kvjax.messages import shown
from kvjax.models.gguf.walk import MOST_NAME, NUMBERS, STRING, Array, Walk

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_SPLIT = re.compile(r".*-\d{5}-of-(\d{5})\.gguf", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """Where a tensor's bytes are.

    Attributes:
        kind: its type, as `gguf.GGMLQuantizationType` counts them.
        shape: as NumPy has it, the last axis is that of neighbours in the file.
        start: of its bytes, in the file.
        row_bytes: of one row of the last axis.
    """

    kind: int
    shape: tuple[int, ...]
    start: int
    row_bytes: int

    @property
    def size(self) -> int:
        """Bytes of it."""
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says of itself."""

    path: pathlib.Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    raw: bytes

    def items(self, name: str) -> list[Any]:
        """The array `name` of the metadata.

        Raises:
            ValueError: it is no array; a text of it is not UTF-8.
        """
        array = self.metadata.get(name)
        if not isinstance(array, Array):
            raise ValueError(
                f"{self.path}: `{name}` must be an array; got {shown(array)}."
            )
        if array.kind != STRING:
            mark, said = NUMBERS[array.kind]
            found = struct.unpack_from(f"<{array.count}{mark}", self.raw, array.start)
            return [bool(x) for x in found] if said == "bool" else list(found)
        at, out = array.start, []
        for number in range(array.count):
            (size,) = struct.unpack_from("<Q", self.raw, at)
            at += 8
            try:
                out.append(str(self.raw[at : at + size], "utf-8"))
            except UnicodeDecodeError:
                raise ValueError(
                    f"{self.path}: entry {number} of `{name}` is not UTF-8: "
                    f"{shown(self.raw[at : at + size])}. The file is damaged."
                ) from None
            at += size
        return out


def is_gguf(path: pathlib.Path) -> bool:
    """Whether this is a GGUF file, by its first bytes or by its name."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(4) == MAGIC or path.suffix.lower() == ".gguf"
    except (OSError, ValueError):  # who reads it will say so
        return path.suffix.lower() == ".gguf"


def read_header(path: pathlib.Path) -> Header:
    """What a GGUF file says of itself; weights are not touched.

    Raises:
        ValueError: no GGUF file, one that is cut off or contradicts itself, a part of a
            split one, or tensors of a type that is not read.
    """
    regular(path)
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            return _read(Walk(path, file, size))
    except OSError as wrong:
        raise ValueError(f"Cannot read {path}: {wrong.strerror}.") from None


def _read(walk: Walk) -> Header:
    path = walk.path
    if (magic := bytes(walk.raw[walk.need(4, "the first word") :][:4])) != MAGIC:
        raise ValueError(
            f"{path} is no GGUF file: it begins with {magic!r}, expected {MAGIC!r}. "
            "Download or copy it again."
        )
    version = walk.number("I", "the version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        raise ValueError(
            f"{path} is GGUF of version {version}; expected one of {list(VERSIONS)}"
            + (", little-endian: this one is big-endian. " if swapped else ". ")
            + "Convert it with a current llama.cpp."
        )
    tensors, settings = (walk.number("Q", "a count") for _ in range(2))
    # The shortest entries there can be: of tensors 24 bytes and a dimension, of
    # settings a length, a type and a byte.
    if tensors * 32 + settings * 13 > walk.size - walk.at:
        walk.fail(
            f"it counts {tensors} tensors and {settings} settings, more than "
            f"{walk.size} bytes have room for"
        )
    metadata: dict[str, Any] = {}
    for number in range(settings):
        name = walk.text(f"the name of setting {number}", MOST_NAME)
        if name in metadata:
            walk.fail(f"the setting {shown(name)} stands twice")
        metadata[name] = walk.value(name[:200])
    _refuse_split(path, metadata)
    found = _tensors(walk, tensors, metadata)
    return Header(path=path, metadata=metadata, tensors=found, raw=bytes(walk.raw))


def _tensors(walk: Walk, count: int, metadata: Mapping[str, Any]) -> dict[str, Tensor]:
    """Where the tensors are: inside of the file, each once, and none over another."""
    said: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for number in range(count):
        name = walk.text(f"the name of tensor {number}", MOST_NAME)
        what = f"tensor {name[:200]!r}"
        if name in said:
            walk.fail(f"{what} stands twice")
        axes = walk.number("I", what)
        if not 1 <= axes <= 4:
            walk.fail(f"{what} has {axes} axes; expected 1 to 4")
        sizes = [walk.number("Q", what) for _ in range(axes)]
        if not all(sizes) or math.prod(sizes) > 2**48:
            walk.fail(f"{what} has the sizes {shown(sizes)}")
        kind = walk.number("I", what)
        said[name] = (tuple(reversed(sizes)), kind, walk.number("Q", what))
    return _placed(walk, said, _alignment(walk, metadata))


def _alignment(walk: Walk, metadata: Mapping[str, Any]) -> int:
    align = metadata.get("general.alignment", 32)
    if type(align) is not int or not 0 < align <= 2**20 or align & (align - 1):
        walk.fail(f"`general.alignment` is {shown(align)}; expected a power of two")
    return align


def _placed(
    walk: Walk, said: Mapping[str, tuple[tuple[int, ...], int, int]], align: int
) -> dict[str, Tensor]:
    """Tensors of a shape, a type and an offset, which end in the file one by one."""
    data = -(-walk.at // align) * align
    out, taken = {}, []
    for name, (shape, kind, offset) in said.items():
        what = f"tensor {name[:200]!r}"
        wide = row_bytes(walk.path, what, kind, shape[-1])
        out[name] = one = Tensor(
            kind=kind, shape=shape, start=data + offset, row_bytes=wide
        )
        if offset % align:
            walk.fail(f"{what} begins at {offset}, no multiple of {align}")
        if one.start + one.size > walk.size:
            walk.fail(f"{what} ends behind the file's {walk.size} bytes")
        taken.append((one.start, one.start + one.size, name))
    taken.sort()
    for (_, end, one), (start, _, other) in zip(taken, taken[1:], strict=False):
        if start < end:
            walk.fail(f"tensors {one[:200]!r} and {other[:200]!r} overlap")
    return out


def row_bytes(path: pathlib.Path, what: str, kind: int, width: int) -> int:
    """Bytes of `width` numbers of a type.

    Raises:
        ValueError: the type is none of the library's, or has blocks of another size.
    """
    from kvjax.models.gguf.library import sizes

    name, block, size = sizes(path, what, kind)
    if width % block:
        raise ValueError(
            f"{path}: {what} is {name}, in blocks of {block} numbers, and has rows of "
            f"{width}. The file is damaged; download or copy it again."
        )
    return width // block * size


def _refuse_split(path: pathlib.Path, metadata: Mapping[str, Any]) -> None:
    named = _SPLIT.fullmatch(path.name)
    parts = metadata.get("split.count", named[1] if named else 1)
    if parts not in (0, 1, "00001"):
        raise ValueError(
            f"{path} is one of {shown(parts)} parts of a split GGUF, which is not "
            "read. Merge them first (`llama-gguf-split --merge FIRST OUT.gguf`)."
        )
