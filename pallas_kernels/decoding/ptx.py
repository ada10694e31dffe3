"""The instructions of a warp, emitted for a GPU; `warps` simulates the same methods.

A register is an MLIR value, `i32` or `f32`. What Mosaic GPU has no operation for is one
line of PTX.
"""

import dataclasses
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
    """Rows of bytes in shared memory, as the copy engine laid them out.

    Attributes:
        base: address, `i32`.
        width: bytes per row.
        swizzle: of the tiles of 8 rows, in bytes; 16 is none.
    """

    base: Any
    width: int
    swizzle: int = 16


def shared_address(ref) -> Any:
    """The address of a reference in shared memory."""
    return llvm.ptrtoint(_i32(), utils.memref_ptr(ref))


def _i32():
    return ir.IntegerType.get_signless(32)


def _f32():
    return ir.F32Type.get()


def _constant(value: int):
    return arith.constant(_i32(), (value & 0xFFFFFFFF) - (value >> 31 & 1) * 2**32)


class Emitted:
    """A warpgroup of a GPU."""

    def __init__(self):
        self.thread = self.low(utils.thread_idx(), 127)
        self.lane = self.low(self.thread, 31)
        self.warp = self.right(self.thread, 5)

    def word(self, value):
        return _constant(value)

    def number(self, value):
        return arith.constant(_f32(), float(value))

    def add(self, a, b):
        return arith.addi(a, b)

    def mul(self, a, b):
        return arith.muli(a, b)

    def low(self, a, mask):
        return arith.andi(a, _constant(mask))

    def union(self, a, b):
        return arith.ori(a, b)

    def common(self, a, b):
        return arith.andi(a, b)

    def right(self, a, count):
        return arith.shrui(a, _constant(count))

    def left(self, a, count):
        return arith.shli(a, _constant(count))

    def permute(self, a, b, selector):
        return _word(f"prmt.b32 $0, $1, $2, {selector:#x};", a, b)

    def less(self, a, b):
        return arith.cmpi(arith.CmpIPredicate.slt, a, b)

    def both(self, a, b):
        return arith.andi(a, b)

    def choose(self, condition, a, b):
        return arith.select(condition, a, b)

    def fadd(self, a, b):
        return arith.addf(a, b)

    def fmul(self, a, b):
        return arith.mulf(a, b)

    def fma(self, a, b, c):
        return _number("fma.rn.f32 $0, $1, $2, $3;", a, b, c)

    def fmax(self, a, b):
        return arith.maxnumf(a, b)

    def exp2(self, a):
        return _number("ex2.approx.ftz.f32 $0, $1;", a)

    def tanh(self, a):
        return _number("tanh.approx.f32 $0, $1;", a)

    def above(self, a, b):
        return arith.cmpf(arith.CmpFPredicate.OGT, a, b)

    def halves(self, pair, kind):
        if kind == "bf16":
            return tuple(
                self.as_number(x)
                for x in (self.left(pair, 16), self.low(pair, 0xFFFF0000))
            )
        both = llvm.inline_asm(
            llvm.StructType.get_literal([_f32()] * 2),
            [pair],
            "{ .reg .b16 a, b; mov.b32 {a, b}, $2; "
            "cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }",
            "=f,=f,r",
        )
        return tuple(llvm.extractvalue(_f32(), both, [i]) for i in range(2))

    def pair(self, first, second, kind):
        # The first source goes to the upper half.
        return _word(f"cvt.rn.{kind}x2.f32 $0, $1, $2;", second, first)

    def pair_mul(self, a, b):
        return _word("mul.rn.f16x2 $0, $1, $2;", a, b)

    def nonzero(self, pair):
        zero, found = _constant(0), _constant(0)
        for bits, all_bits in ((0x7FFF, 0xFFFF), (0x7FFF0000, 0xFFFF0000)):
            some = arith.cmpi(arith.CmpIPredicate.ne, self.low(pair, bits), zero)
            found = arith.ori(found, arith.select(some, _constant(all_bits), zero))
        return found

    def swap(self, a, distance):
        return utils.shfl_bfly(a, distance)

    def turn(self, pair):
        return _word(
            "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", pair, convergent=True
        )

    def mma(self, c, a, b, kind):
        found = llvm.inline_asm(
            llvm.StructType.get_literal([_f32()] * 4),
            [*a, *b, *c],
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            convergent=True,
        )
        return tuple(llvm.extractvalue(_f32(), found, [i]) for i in range(4))

    def matrices(self, memory, row, byte, turned):
        how = ".trans" if turned else ""
        found = llvm.inline_asm(
            llvm.StructType.get_literal([_i32()] * 4),
            [self._address(memory, row, byte)],
            f"ldmatrix.sync.aligned.m8n8.x4{how}.shared.b16 {{$0, $1, $2, $3}}, [$4];",
            "=r,=r,=r,=r,r",
            has_side_effects=True,  # what it reads changes with the block
            convergent=True,
        )
        return [llvm.extractvalue(_i32(), found, [i]) for i in range(4)]

    def words(self, memory, row, byte, count):
        pointer = llvm.inttoptr(
            llvm.PointerType.get(3), self._address(memory, row, byte)
        )
        return _loaded(pointer, count, 32)

    def _address(self, memory, row, byte):
        """Tiles of 8 rows lie one behind the other; chunks of 16 bytes are permuted."""
        width, wide = memory.width, memory.swizzle
        if wide == 16:
            offset = arith.addi(arith.muli(row, _constant(width)), byte)
            return arith.addi(memory.base, offset)
        eighth, inside = self.right(row, 3), self.low(row, 7)
        column, rest = self.right(byte, wide.bit_length() - 1), self.low(byte, wide - 1)
        tile = arith.addi(arith.muli(eighth, _constant(width // wide)), column)
        moved = arith.shrui(arith.muli(inside, _constant(wide)), _constant(7))
        moved = self.left(self.low(moved, wide // 16 - 1), 4)
        offset = arith.addi(
            arith.muli(tile, _constant(8 * wide)), arith.muli(inside, _constant(wide))
        )
        offset = arith.addi(offset, arith.xori(rest, moved))
        return arith.addi(memory.base, offset)

    def fetch(self, memory, index, count, bits):
        kind = ir.IntegerType.get_signless(bits)
        wide = arith.extui(ir.IntegerType.get_signless(64), index)
        pointer = utils.getelementptr(utils.memref_ptr(memory), [wide], kind)
        return _loaded(pointer, count, bits)

    def as_number(self, word):
        return arith.bitcast(_f32(), word)

    def as_word(self, number):
        return arith.bitcast(_i32(), number)


def _word(text, *operands, convergent=False):
    constraints = ",".join(["=r", *("f" if _is_float(x) else "r" for x in operands)])
    return llvm.inline_asm(
        _i32(), list(operands), text, constraints, convergent=convergent
    )


def _number(text, *operands):
    constraints = ",".join(["=f", *("f" for _ in operands)])
    return llvm.inline_asm(_f32(), list(operands), text, constraints)


def _is_float(x):
    return isinstance(x.type, ir.F32Type)


def _loaded(pointer, count, bits):
    """`count` consecutive numbers as words; they are aligned to their whole size."""
    kind = ir.IntegerType.get_signless(bits)
    if count == 1:
        found = llvm.load(kind, pointer)
        return [found if bits == 32 else arith.extui(_i32(), found)]
    words = count * bits // 32
    packed = ir.VectorType.get((words,), _i32())
    found = llvm.load(packed, pointer, alignment=min(16, 4 * words))
    return [
        vector.extract(found, dynamic_position=[], static_position=[i])
        for i in range(words)
    ]


def moved(base, count, size: int):
    """An address, `count` times `size` bytes on."""
    return arith.addi(base, arith.muli(count, _constant(size)))
