"""Scores of a warp: queries times keys, see `program`."""

from typing import Any

from kvjax.pallas_kernels.decoding.stored import OWN, TINY, floats, matrices, repeated


def scores(ops, plan: Any, near: dict, of_slot: list, q: list) -> list:
    """Products of queries and keys, `[2 tiles of slots][column]` of four registers."""
    if not plan.keys.coded:
        return _plain_scores(ops, plan, near["keys"], q)
    tiles = _code_tiles(ops, plan.keys, near["keys"])
    if plan.keys.axis == "token":
        return _token_scores(ops, plan, tiles, of_slot, q)
    return _channel_scores(ops, plan, tiles, near, q)


def _zeros(ops):
    return tuple(ops.number(0.0) for _ in range(4))


def _columns(plan, q, tile):
    """The right operands of a tile of channels, per column."""
    count = len(plan.keys.tiles)
    return [
        q[2 * (column * count + tile) : 2 * (column * count + tile) + 2]
        for column in range(plan.columns)
    ]


def _code_tiles(ops, side, memory):
    """The left operands of the scores, `[2 tiles of slots][tile of channels]`."""
    found = matrices(ops, side, memory, False)
    nothing = ops.word(0)
    out = []
    for tile in range(2):
        of_tile = []
        halves = {}
        for chunk, slab, _ in side.tiles:
            if chunk not in halves:
                halves[chunk] = [
                    ops.permute(found[tile, half, chunk], nothing, selector)
                    for selector in (0x4140, 0x4342)
                    for half in range(2)
                ]
            mask = (2**side.bits - 1) << side.bits * slab
            mask = mask | mask << 16
            whole = side.bits == 8
            of_tile.append([x if whole else ops.low(x, mask) for x in halves[chunk]])
        out.append(of_tile)
    return out


def _constants(ops, side, slab):
    """Left operands that sum up a right one: for the zero point, and for zeros."""
    weight = 2 ** (side.bits * slab) * TINY
    return [repeated(ops, x, "f16") for x in (-side.half * weight, weight)]


def _channel_scores(ops, plan, tiles, near, q):
    """Keys whose scales belong to channels: they meet the queries."""
    side = plan.keys
    out, operands, before = [], [], None
    for tile in range(2):
        if before is None or side.group < OWN:
            operands, before = _scaled(ops, plan, near, q, tile)
        sums = list(before)
        for number, left in enumerate(tiles[tile]):
            for column in range(plan.columns):
                right = operands[number][column]
                sums[column] = ops.mma(sums[column], left, right, "f16")
        out.append(sums)
    return out


def _scaled(ops, plan, near, q, tile):
    """Queries times scales per tile of channels and column, and what codes add."""
    side = plan.keys
    slot = ops.add(ops.mul(ops.warp, ops.word(OWN)), ops.word(16 * tile))
    group = ops.right(slot, side.group.bit_length() - 1)
    place = ops.left(ops.low(ops.lane, 3), 3)
    operands, sums = [], [_zeros(ops)] * plan.columns
    for number, (_, slab, channel) in enumerate(side.tiles):
        byte = ops.add(place, ops.word(2 * channel))
        point, once = _constants(ops, side, slab)
        scale = ops.words(near["keys_scale"], group, byte, 2)
        zero = []
        if not side.symmetric:
            zero = ops.words(near["keys_zero"], group, byte, 2)
        of_tile = []
        for column, query in enumerate(_columns(plan, q, number)):
            right = [ops.pair_mul(x, y) for x, y in zip(query, scale, strict=True)]
            shift = right
            if zero:
                shift = [ops.pair_mul(x, y) for x, y in zip(query, zero, strict=True)]
            less = once if zero else point
            sums[column] = ops.mma(sums[column], less, shift, "f16")
            of_tile.append(right)
        operands.append(of_tile)
    return operands, sums


def _token_scores(ops, plan, tiles, of_slot, q):
    """Keys whose scales belong to slots: they meet the scores of each group."""
    side = plan.keys
    out = [[_zeros(ops)] * plan.columns for _ in range(2)]
    of_slot = [
        {name: floats(ops, slot[name]) for name in slot if name.startswith("keys")}
        for slot in of_slot
    ]
    for group in range(side.groups):
        members = [
            (number, slab)
            for number, (_, slab, channel) in enumerate(side.tiles)
            if channel // side.group == group
        ]
        for column in range(plan.columns):
            shift = _zeros(ops)
            for number, slab in members:
                right = _columns(plan, q, number)[column]
                point, once = _constants(ops, side, slab)
                less = point if side.symmetric else once
                shift = ops.mma(shift, less, right, "f16")
            for tile in range(2):
                sums = shift if side.symmetric else _zeros(ops)
                for number, _ in members:
                    right = _columns(plan, q, number)[column]
                    sums = ops.mma(sums, tiles[tile][number], right, "f16")
                scaled = []
                for i, old in enumerate(out[tile][column]):
                    slot = of_slot[2 * tile + i // 2]
                    new = ops.fma(sums[i], slot["keys_scale"][group], old)
                    if not side.symmetric:
                        new = ops.fma(shift[i], slot["keys_zero"][group], new)
                    scaled.append(new)
                out[tile][column] = tuple(scaled)
    return out


def _plain_scores(ops, plan, memory, q):
    """Keys as they are."""
    side = plan.keys
    found = matrices(ops, side, memory, False)
    out = []
    for tile in range(2):
        sums = [_zeros(ops)] * plan.columns
        for number in range(len(side.tiles)):
            left = [
                found[tile, half, 2 * number + chunk]
                for chunk in range(2)
                for half in range(2)
            ]
            for column, right in enumerate(_columns(plan, q, number)):
                sums[column] = ops.mma(sums[column], left, right, side.kind)
        out.append(sums)
    return out
