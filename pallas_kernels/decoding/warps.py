"""The instructions of a warp, simulated: what `ptx` emits, with the same methods.

A program for the lanes of a warpgroup (see `program`) is written against these methods
once. `ptx.Emitted` turns it into instructions of a GPU; here every register of every
lane is an element of an array `[128]`, so the interpreter and the tests run the program
itself, register by register. Registers are uint32 or float32; a "pair" is two 16-bit
numbers in one register, the first in its low half.

Source: PTX ISA 8.7, `mma.m16n8k16`, `ldmatrix`, `movmatrix`, `prmt`.
"""

import ml_dtypes
import numpy as np

LANES = 32
WARPS = 4
THREADS = LANES * WARPS


class Simulated:
    """A warpgroup in NumPy; memory is arrays of bytes or numbers.

    Not in JAX: thousands of operations on 128 numbers each take longer to compile.
    """

    def __init__(self):
        self.thread = np.arange(THREADS, dtype=np.uint32)
        self.lane = self.thread % LANES
        self.warp = self.thread // LANES

    # Integers and bits

    def word(self, value):
        """A uint32 constant."""
        return np.full(THREADS, int(value) & 0xFFFFFFFF, np.uint32)

    def number(self, value):
        """A float32 constant."""
        return np.full(THREADS, value, np.float32)

    def add(self, a, b):
        return a + b

    def mul(self, a, b):
        return a * b

    def low(self, a, mask):
        """`a & mask`, a constant."""
        return a & np.uint32(mask)

    def union(self, a, b):
        return a | b

    def common(self, a, b):
        return a & b

    def right(self, a, count):
        return a >> np.uint32(count)

    def left(self, a, count):
        return a << np.uint32(count)

    def permute(self, a, b, selector):
        """Four of the eight bytes of `a` (0 to 3) and `b` (4 to 7)."""
        found = np.zeros_like(a)
        for place in range(4):
            which = selector >> (4 * place) & 7
            source = a if which < 4 else np.asarray(b, np.uint32)
            byte = source >> np.uint32(8 * (which % 4)) & np.uint32(0xFF)
            found = found | byte << np.uint32(8 * place)
        return found

    def less(self, a, b):
        """Signed comparison."""
        return a.astype(np.int32) < b.astype(np.int32)

    def both(self, a, b):
        """Of two conditions."""
        return a & b

    def choose(self, condition, a, b):
        return np.where(condition, a, b)

    # float32

    def fadd(self, a, b):
        return a + b

    def fmul(self, a, b):
        return a * b

    def fma(self, a, b, c):
        return a * b + c

    def fmax(self, a, b):
        return np.maximum(a, b)

    def exp2(self, a):
        return np.exp2(a)

    def tanh(self, a):
        return np.tanh(a)

    def above(self, a, b):
        return a > b

    # Pairs

    def halves(self, pair, kind):
        """Both numbers of a pair in float32; `kind` is "f16" or "bf16"."""
        return tuple(self._float(x, kind) for x in (pair & 0xFFFF, pair >> 16))

    def pair(self, first, second, kind):
        """A pair from two float32 numbers."""
        dtype = np.float16 if kind == "f16" else ml_dtypes.bfloat16
        low, high = (x.astype(dtype).view(np.uint16) for x in (first, second))
        return low.astype(np.uint32) | high.astype(np.uint32) << 16

    def pair_mul(self, a, b):
        """The product of float16 pairs."""
        x, y = self.halves(a, "f16"), self.halves(b, "f16")
        return self.pair(x[0] * y[0], x[1] * y[1], "f16")

    def nonzero(self, pair):
        """All bits of each half of a pair that is no zero."""
        low = np.where(pair & 0x7FFF != 0, np.uint32(0xFFFF), np.uint32(0))
        high = np.where(pair & 0x7FFF0000 != 0, np.uint32(0xFFFF0000), np.uint32(0))
        return low | high

    def _float(self, bits, kind):
        dtype = np.float16 if kind == "f16" else ml_dtypes.bfloat16
        found = bits.astype(np.uint16).view(dtype)
        return found.astype(np.float32)

    # Between lanes

    def swap(self, a, distance):
        """The register of the lane whose number differs in the bit `distance`."""
        return a[self.thread ^ np.uint32(distance)]

    def turn(self, pair):
        """A matrix of 8 x 8 halves, rows over groups of four lanes, transposed."""
        full = _rows(pair)
        return _unrows(full.swapaxes(-1, -2))

    def mma(self, c, a, b, kind):
        """`c + a @ b`, 16 x 8 and 16 x 16 and 16 x 8 per warp, float32 sums."""
        a00, a10, a01, a11 = (self._matrix(x, kind) for x in a)
        wide = np.concatenate(
            [np.concatenate([a00, a01], 2), np.concatenate([a10, a11], 2)], 1
        )
        tall = np.concatenate([self._matrix(x, kind) for x in b], 2)  # [4, n, k]
        found = np.einsum("wmk,wnk->wmn", wide, tall)
        top, bottom = (found[:, x : x + 8].reshape(THREADS, 2) for x in (0, 8))
        parts = (top[:, 0], top[:, 1], bottom[:, 0], bottom[:, 1])
        return tuple(x + y for x, y in zip(c, parts, strict=True))

    def _matrix(self, pair, kind):
        return self._float(_rows(pair), kind)

    # Memory

    def matrices(self, memory, row, byte, turned):
        """Four matrices of 8 x 8 halves; lane `8 m + r` names row `r` of the `m`-th.

        Args:
            memory: `[rows, bytes]` uint8.
            row: of the lane.
            byte: first of the 16 of the lane's row.
            turned: each matrix is transposed.
        """
        place = row[:, None], byte[:, None] + np.arange(16, dtype=np.uint32)
        found = memory[place].astype(np.uint32).reshape(WARPS, 4, 8, 8, 2)
        halves = found[..., 0] | found[..., 1] << 8
        if turned:
            halves = halves.swapaxes(-1, -2)
        return [_unrows(halves[:, m]) for m in range(4)]

    def words(self, memory, row, byte, count):
        """`count` consecutive words of shared memory, `[rows, bytes]` uint8."""
        place = row[:, None], byte[:, None] + np.arange(4 * count, dtype=np.uint32)
        found = memory[place].astype(np.uint32).reshape(THREADS, count, 4)
        return [_join(found[:, i]) for i in range(count)]

    def fetch(self, memory, index, count, bits):
        """`count` consecutive numbers of main memory as words, 16-bit ones in pairs."""
        at = index[:, None] + np.arange(count, dtype=np.uint32)
        flat = memory.reshape(-1).view(np.uint16 if bits == 16 else np.uint32)
        found = flat[at].astype(np.uint32)
        if bits == 32:
            return [found[:, i] for i in range(count)]
        found = np.pad(found, ((0, 0), (0, count % 2)))
        return [
            found[:, i] | found[:, i + 1] << 16 for i in range(0, found.shape[1], 2)
        ]

    def as_number(self, word):
        return word.view(np.float32)

    def as_word(self, number):
        return number.view(np.uint32)


def _rows(pair):
    """Registers of pairs as matrices `[warps, 8, 8]` of halves."""
    full = np.stack([pair & 0xFFFF, pair >> 16], -1)
    return full.reshape(WARPS, 8, 8)


def _unrows(full):
    full = full.reshape(THREADS, 2)
    return full[:, 0] | full[:, 1] << 16


def _join(four):
    return sum((four[:, i] << np.uint32(8 * i) for i in range(1, 4)), start=four[:, 0])
