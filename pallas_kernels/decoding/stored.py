"""How keys or values lie in memory, for the kernels of a GPU; static."""

import dataclasses
from typing import Any, Self

import jax.numpy as jnp
import numpy as np

from kvjax.pallas_kernels.quantized import Quantized

OWN = 32
"""Slots of a block that one warp reads."""

TINY = 2.0**-24
"""The smallest float16: bits of a code below 1024 are that many of it."""

CHUNK = 16
"""Bytes of a slot that one matrix of 8 x 8 halves covers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """Keys or values.

    Attributes:
        width: channels, `D`.
        bits: of a number in memory; 16 for plain arrays.
        kind: "bf16" or "f16", of plain arrays.
        axis: of the groups, see `Quantized`; "" for plain arrays.
        group: of the groups.
        symmetric: there are no zeros.
    """

    width: int
    bits: int = 16
    kind: str = "bf16"
    axis: str = ""
    group: int = 0
    symmetric: bool = True

    @classmethod
    def of(cls, side: Any) -> Self:
        """The description of keys or values."""
        if not isinstance(side, Quantized):
            kind = "f16" if side.dtype == jnp.float16 else "bf16"
            return cls(width=side.shape[-1], kind=kind)
        return cls(
            width=side.shape[-1],
            bits=side.bits,
            axis=side.axis,
            group=side.group,
            symmetric=side.zero is None,
        )

    @property
    def coded(self) -> bool:
        """Whether these are codes."""
        return self.bits != 16

    @property
    def packed(self) -> int:
        """Bytes of a slot."""
        return self.width * self.bits // 8

    @property
    def slabs(self) -> int:
        """Codes per byte."""
        return 8 // self.bits if self.coded else 1

    @property
    def tiles(self) -> list[tuple[int, int, int]]:
        """(chunk, slab, first channel) of each 16 channels that one product takes."""
        if not self.coded:
            return [(at, 0, at * CHUNK) for at in range(self.width // CHUNK)]
        slab = self.width // self.slabs
        return [
            (chunk, i, i * slab + chunk * CHUNK)
            for chunk in range(self.packed // CHUNK)
            for i in range(self.slabs)
        ]

    @property
    def groups(self) -> int:
        """Groups of channels, each with a scale per slot; 1 where there are none."""
        return self.width // self.group if self.axis == "token" else 1

    @property
    def half(self) -> int:
        """The zero point of symmetric codes."""
        return (2**self.bits - 1) // 2

    def refusal(self, name: str, other: tuple[str, ...]) -> str | None:
        """Why the kernels do not read it, if they do not; `other` are the good axes."""
        if self.width not in (64, 128):
            return f"heads must have 64 or 128 channels; got {self.width}"
        if not self.coded:
            return None
        if self.bits == 1:
            return f"`{name}` has 1-bit codes, which have no GPU kernel"
        if self.axis not in other:
            return (
                f"`{name}` must have groups per {' or '.join(other)}; got {self.axis}"
            )
        if self.group not in (16, 32, 64, 128):
            return f"`{name}` must have groups of 16, 32, 64 or 128; got {self.group}"
        return None


def matrices(ops, side: Stored, memory, turned: bool) -> dict:
    """All matrices of 8 slots x 16 bytes of a warp, by (16 slots, 8 of them, chunk).

    Lane `4 g + t` holds the word `t` of slot `g`; or, turned, the halves `g` of the
    slots `2 t` and `2 t + 1`.
    """
    listed = [
        (tile, half, chunk)
        for tile in range(2)
        for chunk in range(side.packed // CHUNK)
        for half in range(2)
    ]
    row = ops.add(ops.mul(ops.warp, ops.word(OWN)), ops.low(ops.lane, 7))
    # Of four matrices lane 8 m + r names row r of the m-th: 8 slots on for odd m, and
    # the next 16 bytes, or the next 16 slots, for the last two.
    which = ops.right(ops.lane, 3)
    down = ops.left(ops.low(which, 1), 3)
    across = ops.left(ops.right(which, 1), 4)
    found = {}
    for first in range(0, len(listed), 4):
        four = listed[first : first + 4]
        tile, _, chunk = four[0]
        at = ops.add(ops.add(row, down), ops.word(16 * tile))
        byte = ops.word(CHUNK * chunk)
        if four[2][0] != tile:
            at = ops.add(at, across)
        else:
            byte = ops.add(byte, across)
        registers = ops.matrices(memory, at, byte, turned)
        found.update(zip(four, registers, strict=True))
    return found


def repeated(ops, number: float, kind: str) -> list:
    """The left operand of a product whose 16 x 16 entries are one number."""
    bits = np.asarray(number, np.float32).view(np.uint32) >> 16
    if kind == "f16":
        bits = np.asarray(number, np.float16).view(np.uint16)
    return [ops.word(int(bits) << 16 | int(bits))] * 4


def floats(ops, words: list) -> list:
    """Both float16 numbers of each word, in float32."""
    return [x for word in words for x in ops.halves(word, "f16")]
