"""Outputs of a warp: values times probabilities, see `program`."""

from typing import Any

from kvjax.pallas_kernels.decoding.stored import matrices, repeated


def mix(ops, plan: Any, memory, of_slot: list, weights: list, named: dict) -> None:
    """Add the block's values to the sums in `named`.

    Args:
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
    live = [_some(ops, row) for row in weights]
    nothing = ops.number(0.0)
    lefts = {
        chunk: [_numbers(ops, side.bits, found[tile, half, chunk]) for half in range(2)]
        for chunk in {chunk for chunk, _, _ in side.tiles}
    }
    for group in range(side.groups):
        # Scales of free slots may be NaN.
        scales = [
            ops.choose(on, slot["values_scale"][group], nothing)
            for on, slot in zip(live, beside, strict=True)
        ]
        for column in range(columns):
            right = _right(ops, weights, column, "bf16", scales)
            at = 4 * (group * columns + column)
            once = repeated(ops, 1.0, "bf16")
            _accumulate(ops, named["scales"], at, once, right, "bf16")
            for number, (chunk, slab, channel) in enumerate(side.tiles):
                if channel // side.group == group:
                    first, second = (half[slab] for half in lefts[chunk])
                    at = 4 * (number * columns + column)
                    left = [*first, *second]
                    _accumulate(ops, named["out"], at, left, right, "bf16")
        if side.symmetric:
            continue
        for on, slot, row in zip(live, beside, weights, strict=True):
            zero = ops.choose(on, slot["values_zero"][group], nothing)
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
    """For each slab, even and odd bytes of two slots as pairs of `added + w * code`."""
    slabs = [[] for _ in range(8 // bits)]
    for byte in range(2):
        codes = ops.right(word, 8) if byte else word
        for slab, found in enumerate(slabs):
            if bits == 8:
                low = ops.either(ops.low(codes, 0x007F007F), 0x43004300)
                high = ops.flip(ops.low(codes, 0x00800080), 0x43804380)
                found.append(ops.pair_sub(low, high))
                continue
            shift, weight = placed(bits, slab)
            moved = ops.right(codes, shift) if shift else codes
            mask = (2**bits - 1) * weight
            masked = ops.low(moved, mask | mask << 16)
            found.append(ops.either(masked, 0x43004300))
    return slabs


def placed(bits: int, slab: int) -> tuple[int, int]:
    """By how much codes are shifted, and their weight where they are then read.

    The mantissa of bfloat16 has 7 bits: 128 + w * code must stay below 256.
    """
    if bits == 8:
        return 0, 1
    if bits == 4:
        return 4 * slab, 1
    return (0, 4**slab) if slab < 3 else (2, 16)


def finish(ops, plan: Any, named: dict) -> list:
    """Peaks (of base 2), totals and outputs before the division, of this warp."""
    side, columns = plan.values, plan.columns
    totals = [_over_rows(ops, x) for x in named["total"]]
    out = list(named["out"])
    if side.coded:
        zeros = [_over_rows(ops, x) for x in named["zeros"]]
        for i, x in enumerate(out):
            number, column, side_of = i // 4 // columns, i // 4 % columns, i % 4
            _, slab, channel = side.tiles[number]
            at = channel // side.group * columns + column
            _, weight = placed(side.bits, slab)
            added = (-128 if side.bits == 8 else 128) / weight
            added += side.half if side.symmetric else 0
            x = ops.fmul(x, ops.number(1 / weight))
            sums = named["scales"][4 * at + side_of]
            x = ops.fma(sums, ops.number(-added), x)
            if not side.symmetric:
                x = ops.fadd(x, zeros[2 * at + i % 2])
            out[i] = x
    return [*named["peak"], *totals, *out]


def _over_rows(ops, x):
    for distance in (4, 8, 16):
        x = ops.fadd(x, ops.swap(x, distance))
    return x
