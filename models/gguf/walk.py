"""A GGUF file's beginning, read piece by piece, none of which is believed to be there.

A header says of everything how much of it there is. Nothing is made from it that is
larger than what stands in the file. Arrays are walked over, and read when they are
asked for: a vocabulary is needed for a tokenizer alone.
"""

import dataclasses
import pathlib
import struct
from typing import Any, BinaryIO, NoReturn

import numpy as np

MOST_HEADER = 256 * 2**20
"""Bytes of a header; that of a vocabulary of 260,000 pieces takes 7 million."""
MOST_NAME = 2**16
_STEP = 2**20
STRING, _ARRAY = 8, 9
NUMBERS = {
    0: ("B", "uint8"),
    1: ("b", "int8"),
    2: ("H", "uint16"),
    3: ("h", "int16"),
    4: ("I", "uint32"),
    5: ("i", "int32"),
    6: ("f", "float32"),
    7: ("B", "bool"),
    10: ("Q", "uint64"),
    11: ("q", "int64"),
    12: ("d", "float64"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Array:
    """An array of the metadata that was walked over; `Header.items` reads it."""

    kind: int
    count: int
    start: int


class Walk:
    """Bytes of a file's beginning, read as they are needed."""

    def __init__(self, path: pathlib.Path, file: BinaryIO, size: int):
        self.path, self.file, self.size = path, file, size
        self.raw, self.at = bytearray(), 0

    def fail(self, what: str) -> NoReturn:
        raise ValueError(
            f"{self.path} is not a whole GGUF file: {what}. It may be cut off or "
            "damaged; download or copy it again."
        )

    def need(self, count: int, what: str) -> int:
        """Where the next `count` bytes begin, which are then there."""
        start, end = self.at, self.at + count
        if end > self.size:
            self.fail(f"{what} ends behind the file's {self.size} bytes")
        if end > MOST_HEADER:
            self.fail(f"{what} ends behind {MOST_HEADER} bytes, and no header does")
        while len(self.raw) < end:
            more = self.file.read(max(_STEP, end - len(self.raw)))
            if not more:
                self.fail(f"{what} ends behind the file")
            self.raw += more
        self.at = end
        return start

    def number(self, mark: str, what: str) -> Any:
        """One number, as `struct` marks it."""
        start = self.need(struct.calcsize(f"<{mark}"), what)
        return struct.unpack_from(f"<{mark}", self.raw, start)[0]

    def text(self, what: str, most: int = MOST_HEADER) -> str:
        """A text with its length in front."""
        size = self.number("Q", f"the length of {what}")
        if size > most:
            self.fail(f"{what} has a length of {size}; expected at most {most}")
        start = self.need(size, what)
        try:
            return str(self.raw[start : start + size], "utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8")

    def value(self, name: str) -> Any:
        """What the metadata says of `name`."""
        what = f"`{name}`"
        kind = self.number("I", f"the type of {what}")
        if kind == STRING:
            return self.text(what)
        if kind == _ARRAY:
            return self.array(what)
        if kind not in NUMBERS:
            self.fail(f"{what} has the type {kind}; expected one of 0 to 12")
        mark, said = NUMBERS[kind]
        found = self.number(mark, what)
        if said == "float32":  # as somebody wrote it: 1e-6, not 9.99999997e-07
            return float(str(np.float32(found)))
        if said != "bool":
            return found
        if found > 1:
            self.fail(f"{what} is {found}; a bool is 0 or 1")
        return bool(found)

    def array(self, what: str) -> Array:
        """An array, walked over."""
        kind = self.number("I", f"the type of {what}")
        count = self.number("Q", f"the length of {what}")
        if kind == _ARRAY:
            self.fail(f"{what} is an array of arrays, which no setting is")
        if kind not in NUMBERS and kind != STRING:
            self.fail(f"{what} is an array of the type {kind}; expected 0 to 12")
        width = 8 if kind == STRING else struct.calcsize(f"<{NUMBERS[kind][0]}")
        if count * width > self.size - self.at:
            self.fail(f"{what} has {count} entries, more than the file has room for")
        start = self.at
        if kind != STRING:
            self.need(count * width, what)
            return Array(kind=kind, count=count, start=start)
        for _ in range(count):
            head = self.need(8, what)
            self.need(int.from_bytes(self.raw[head : head + 8], "little"), what)
        return Array(kind=kind, count=count, start=start)
