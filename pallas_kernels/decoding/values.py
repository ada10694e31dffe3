"""Outputs of a warp: values times probabilities, see `program`."""

from typing import Any

from kvjax.pallas_kernels.decoding.stored import TINY, floats, matrices

RAISED = 8
"""Weights are 2**8 times as large: after a sink even small ones keep their digits in
float16, and scales below 256 stay in its range."""


def mix(ops, plan: Any, memory, of_slot: list, weights: list, named: dict) -> None:
    """Add the block's values to the sums in `named`.

    Args:
        ops: the instructions.
        plan: the static settings.
        memory: values of the block.
        of_slot: scales and zeros of the lane's four slots.
        weights: of the four slots, for the lane's two queries of each column.
        named: the state by name; its lists change.
    """
    found = matrices(ops, plan.values, memory, True)
    for tile in range(2):
        two = weights[2 * tile : 2 * tile + 2]
        if plan.values.coded:
            beside = of_slot[2 * tile : 2 * tile + 2]
            _mix_codes(ops, plan, found, tile, two, beside, named)
        else:
            _mix_plain(ops, plan, found, tile, two, named)


def _right(ops, weights, column, kind, factors):
    """Weights of 16 slots as the right operand of a product."""
    operand = []
    for row, factor in zip(weights, factors, strict=True):
        pair = row[2 * column : 2 * column + 2]
        if factor is not None:
            pair = [ops.fmul(x, factor) for x in pair]
        operand.append(ops.turn(ops.pair(*pair, kind)))
    return operand


def _accumulate(ops, sums, at, left, right, kind):
    """Replace four registers by their sum with a product."""
    sums[at : at + 4] = ops.mma(tuple(sums[at : at + 4]), left, right, kind)


def _mix_plain(ops, plan, found, tile, weights, named):
    """Values as they are."""
    side, columns = plan.values, plan.columns
    rights = [
        _right(ops, weights, column, side.kind, (None, None))
        for column in range(columns)
    ]
    # What nobody sees may be NaN, and 0 * NaN is NaN.
    seen = []
    for half in range(2):
        mask = ops.nonzero(rights[0][half])
        for right in rights[1:]:
            mask = ops.union(mask, ops.nonzero(right[half]))
        for distance in (4, 8, 16):
            mask = ops.union(mask, ops.swap(mask, distance))
        seen.append(mask)
    for number in range(len(side.tiles)):
        left = [
            ops.common(found[tile, half, 2 * number + chunk], seen[half])
            for half in range(2)
            for chunk in range(2)
        ]
        for column, right in enumerate(rights):
            at = 4 * (number * columns + column)
            _accumulate(ops, named["out"], at, left, right, side.kind)


def _mix_codes(ops, plan, found, tile, weights, beside, named):
    """Codes whose scales belong to slots: they meet the weights of each group."""
    side, columns = plan.values, plan.columns
    # Scales of free slots may be NaN.
    live = [_some(ops, row) for row in weights]
    beside = [
        {
            name: floats(ops, [ops.choose(on, x, ops.word(0)) for x in words])
            for name, words in slot.items()
            if name.startswith("values")
        }
        for on, slot in zip(live, beside, strict=True)
    ]
    lefts = {
        chunk: [_numbers(ops, side.bits, found[tile, half, chunk]) for half in range(2)]
        for chunk in {chunk for chunk, _, _ in side.tiles}
    }
    for group in range(side.groups):
        scales = [slot["values_scale"][group] for slot in beside]
        for column in range(columns):
            right = _right(ops, weights, column, "f16", scales)
            for number, (chunk, slab, channel) in enumerate(side.tiles):
                if channel // side.group == group:
                    first, second = (half[slab] for half in lefts[chunk])
                    at = 4 * (number * columns + column)
                    left = [*first, *second]
                    _accumulate(ops, named["out"], at, left, right, "f16")
        for slot, scale, row in zip(beside, scales, weights, strict=True):
            if side.symmetric:
                zero = ops.fmul(scale, ops.number(-side.half))
            else:
                zero = slot["values_zero"][group]
            for i, weight in enumerate(row):
                at = 2 * group * columns + i
                named["zeros"][at] = ops.fma(weight, zero, named["zeros"][at])


def _some(ops, row):
    """Whether one of the lane's queries gives this slot a weight."""
    most = row[0]
    for other in row[1:]:
        most = ops.fmax(most, other)
    return ops.above(most, ops.number(0.0))


def _numbers(ops, bits, word):
    """For each slab, even and odd bytes of two slots as pairs of float16."""
    slabs = [[] for _ in range(8 // bits)]
    for byte in range(2):
        codes = ops.right(word, 8) if byte else word
        for slab, found in enumerate(slabs):
            mask = (2**bits - 1) << bits * slab
            found.append(ops.low(codes, mask | mask << 16))
    return slabs


def finish(ops, plan: Any, named: dict) -> list:
    """Peaks (of base 2), totals and outputs before the division, of this warp."""
    side, columns = plan.values, plan.columns
    totals = [_over_rows(ops, x) for x in named["total"]]
    zeros = [_over_rows(ops, x) for x in named["zeros"]]
    out = []
    for i, x in enumerate(named["out"]):
        number, column, register = i // 4 // columns, i // 4 % columns, i % 4
        _, slab, channel = side.tiles[number]
        if side.coded:
            x = ops.fmul(x, ops.number(2 ** -(side.bits * slab) / TINY))
            at = channel // side.group * columns + column
            x = ops.fadd(x, zeros[2 * at + register % 2])
        out.append(x)
    peaks = [ops.fadd(x, ops.number(-RAISED)) for x in named["peak"]]
    return [*peaks, *totals, *out]


def _over_rows(ops, x):
    for distance in (4, 8, 16):
        x = ops.fadd(x, ops.swap(x, distance))
    return x
