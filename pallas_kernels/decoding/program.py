"""What one warp does with 32 slots of a block: the decode step, register by register.

Written once against the instructions of `warps` and `ptx`. Scores and outputs are
transposed, slots or channels along the 16 rows of an `mma` and queries along its 8
columns: keys and values are then its left operand, which codes become in registers,
and the few queries of a decode step fill it.

Codes become numbers by bits: as a float16 the bits of a number c < 1024 are c times
2**-24, below its normal numbers, which products on tensor cores keep. So a byte is two
channels' operands by one byte permutation (keys) or shift (values), and each slab of
codes by one mask: no offset, no conversion. A slab i bits higher is 2**i times larger,
and queries or, at the end, outputs smaller. Scales of channels meet the queries, scales
of slots the scores or probabilities. Zeros of keys are one more product, of a constant
with zeros times queries; zeros of values meet the probabilities, once for all channels.

Which channel a code belongs to follows from where lanes find it: of each 16 channels
the left operand of the scores has `4 t, 4 t + 1` and `4 t + 2, 4 t + 3` where `mma`
wants `2 t, 2 t + 1` and `2 t + 8, 2 t + 9`; that of the outputs has `2 g` and `2 g + 1`
in its rows `g` and `g + 8`.
"""

import dataclasses
import math
from typing import Any

from kvjax.pallas_kernels.decoding import keys, values
from kvjax.pallas_kernels.decoding.stored import OWN, Stored

BLOCK = 128
"""Slots per step, 32 for each of the four warps."""

DEAD = float("-inf")
_LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Static settings of a program.

    Attributes:
        keys: how they lie.
        values: likewise.
        columns: queries, in eights.
        softcap: of the logits, or None.
        window: of positions, or None.
        located: slots have positions.
        biased: slots have log-weights.
    """

    keys: Stored
    values: Stored
    columns: int
    softcap: float | None = None
    window: int | None = None
    located: bool = False
    biased: bool = False

    @property
    def layout(self) -> dict[str, int]:
        """Registers of the state of a lane by name, in order."""
        groups = self.values.groups if self.values.coded else 0
        return {
            "peak": 2 * self.columns,
            "total": 2 * self.columns,
            "out": 4 * self.columns * len(self.values.tiles),
            "zeros": 2 * self.columns * groups,
        }

    @property
    def kept(self) -> int:
        """Registers of a lane's state."""
        return sum(self.layout.values())

    @property
    def operands(self) -> int:
        """Registers of a lane that hold queries."""
        return 2 * self.columns * len(self.keys.tiles)

    @property
    def beside(self) -> int:
        """Registers of a lane that hold what lies beside its four slots."""
        words = self.located + self.biased
        for side in (self.keys, self.values):
            if side.axis == "token":
                words += (side.groups + 1) // 2 * (1 if side.symmetric else 2)
        return 4 * words

    @property
    def results(self) -> int:
        """Registers of a lane that `finish` returns."""
        layout = self.layout
        return layout["peak"] + layout["total"] + layout["out"]

    def split(self, registers: list[Any]) -> dict[str, list[Any]]:
        """Registers by name."""
        found, at = {}, 0
        for name, count in self.layout.items():
            found[name] = registers[at : at + count]
            at += count
        return found


def start(ops, plan: Plan) -> list:
    """The state before any slot."""
    peak = [ops.number(DEAD)] * plan.layout["peak"]
    return peak + [ops.number(0.0)] * (plan.kept - len(peak))


def queries(ops, plan: Plan, memory, first) -> list:
    """The right operands of the scores, two registers per tile of channels and column.

    Args:
        ops: the instructions.
        plan: the static settings.
        memory: queries `[..., 8 columns, D]`, 16-bit; divided by the slab's weight.
        first: index of the first number of this head.
    """
    found = []
    width = plan.keys.width
    row, place = ops.right(ops.lane, 2), ops.low(ops.lane, 3)
    for column in range(plan.columns):
        of_row = ops.add(first, ops.mul(row, ops.word(width)))
        for _, _, channel in plan.keys.tiles:
            at = ops.add(of_row, ops.word(8 * column * width + channel))
            if plan.keys.coded:
                four = ops.add(at, ops.left(place, 2))
                found += ops.fetch(memory, four, 4, 16)
            else:
                two = ops.add(at, ops.left(place, 1))
                found += ops.fetch(memory, two, 2, 16)
                found += ops.fetch(memory, ops.add(two, ops.word(8)), 2, 16)
    return found


def per_column(ops, plan: Plan, memory, first) -> list:
    """Words that belong to the two queries of a lane in each column."""
    at = ops.add(first, ops.left(ops.low(ops.lane, 3), 1))
    return [
        word
        for column in range(plan.columns)
        for word in ops.fetch(memory, ops.add(at, ops.word(8 * column)), 2, 32)
    ]


def rows(ops) -> list:
    """The four slots of a block that belong to a lane, 8 apart."""
    base = ops.add(ops.mul(ops.warp, ops.word(OWN)), ops.right(ops.lane, 2))
    return [ops.add(base, ops.word(8 * i)) for i in range(4)]


def beside(ops, plan: Plan, places: list, memories: dict) -> list:
    """What lies beside codes, per slot of the lane: scales, zeros, position, weight.

    Args:
        ops: the instructions.
        plan: the static settings.
        places: for each slot, its index in the store and in `memories["bias"]`.
        memories: main memory by name; scales and zeros per slot, 16-bit.
    """
    found = []
    for slot, listed in places:
        for name, side in (("keys", plan.keys), ("values", plan.values)):
            if side.axis != "token":
                continue
            at = ops.mul(slot, ops.word(side.groups))
            for part in ("scale", "zero")[: 1 if side.symmetric else 2]:
                memory = memories[f"{name}_{part}"]
                found += ops.fetch(memory, at, side.groups, 16)
        if plan.located:
            found += ops.fetch(memories["positions"], slot, 1, 32)
        if plan.biased:
            found += ops.fetch(memories["bias"], listed, 1, 32)
    return found


def sorted_beside(ops, plan: Plan, words: list) -> list[dict[str, Any]]:
    """What `beside` gave by name for each of the four slots; scales stay words."""
    words, found = list(words), []
    for _ in range(4):
        of_slot: dict[str, Any] = {}
        for name, side in (("keys", plan.keys), ("values", plan.values)):
            if side.axis != "token":
                continue
            for part in ("scale", "zero")[: 1 if side.symmetric else 2]:
                count = (side.groups + 1) // 2
                of_slot[f"{name}_{part}"] = words[:count]
                del words[:count]
        if plan.located:
            of_slot["position"] = words.pop(0)
        if plan.biased:
            of_slot["bias"] = ops.as_number(words.pop(0))
        found.append(of_slot)
    return found


def step(ops, plan: Plan, near: dict, more: list, query: dict, bounds, state) -> list:
    """The state after a block.

    Args:
        ops: the instructions.
        plan: the static settings.
        near: shared memory by name: keys, keys_scale, keys_zero, values.
        more: of `beside`, for this block.
        query: `q`, `factor` and, with positions, `now`.
        bounds: first slot of the block that is held, and the one behind the last.
        state: before it.
    """
    of_slot = sorted_beside(ops, plan, more)
    logits = keys.scores(ops, plan, near, of_slot, query["q"])
    logits = _visible(ops, plan, logits, of_slot, query, bounds)
    named = plan.split(state)
    weights, fade = _softmax(ops, plan, logits, named)
    named["out"] = _faded(ops, named["out"], fade, 4)
    named["zeros"] = _faded(ops, named["zeros"], fade, 2)
    values.mix(ops, plan, near["values"], of_slot, weights, named)
    return [x for part in named.values() for x in part]


def _visible(ops, plan, logits, of_slot, query, bounds):
    """Logits times log2 e, -inf where a query does not see a slot."""
    begins, ends = bounds
    dead = ops.number(DEAD)
    out = []
    for i, (slot, row) in enumerate(zip(of_slot, rows(ops), strict=True)):
        held = ops.both(
            ops.less(row, ends), ops.less(begins, ops.add(row, ops.word(1)))
        )
        tile, lower = logits[i // 2], 2 * (i % 2)
        of_row = []
        for column in range(plan.columns):
            for side in range(2):
                at = 2 * column + side
                x = ops.fmul(tile[column][lower + side], query["factor"][at])
                if plan.softcap is not None:
                    x = ops.tanh(ops.fmul(x, ops.number(1 / plan.softcap)))
                    x = ops.fmul(x, ops.number(plan.softcap))
                seen = held
                if plan.located:
                    place, now = slot["position"], query["now"][at]
                    after = ops.add(now, ops.word(1))
                    here = ops.both(
                        ops.less(place, after), ops.less(ops.word(-1), place)
                    )
                    seen = ops.both(seen, here)
                    if plan.window is not None:
                        oldest = ops.add(now, ops.word(-plan.window))
                        seen = ops.both(seen, ops.less(oldest, place))
                if plan.biased:
                    # A hidden key may be NaN, and NaN + -inf is NaN.
                    seen = ops.both(seen, ops.above(slot["bias"], dead))
                    x = ops.fadd(x, slot["bias"])
                x = ops.fmul(x, ops.number(_LOG2E))
                of_row.append(ops.choose(seen, x, dead))
        out.append(of_row)
    return out


def _softmax(ops, plan, logits, named):
    """Weights of each slot and query, and by how much older ones fade."""
    fade = []
    weights = [list(row) for row in logits]
    for at in range(2 * plan.columns):
        peak = logits[0][at]
        for row in logits[1:]:
            peak = ops.fmax(peak, row[at])
        for distance in (4, 8, 16):
            peak = ops.fmax(peak, ops.swap(peak, distance))
        peak = ops.fmax(peak, named["peak"][at])
        # A block may be hidden as a whole, and -inf - -inf is NaN.
        some = ops.above(peak, ops.number(DEAD))
        less = ops.choose(some, ops.fmul(peak, ops.number(-1.0)), ops.number(0.0))
        fade.append(ops.exp2(ops.fadd(named["peak"][at], less)))
        anchor = ops.fadd(less, ops.number(values.RAISED))
        total = ops.fmul(named["total"][at], fade[-1])
        for row in range(4):
            weight = ops.exp2(ops.fadd(logits[row][at], anchor))
            weights[row][at] = weight
            total = ops.fadd(total, weight)
        named["peak"][at], named["total"][at] = peak, total
    return weights, fade


def _faded(ops, registers, fade, size):
    """Sums over slots, `size` registers per column, in the scale of the new peak."""
    columns = len(fade) // 2
    return [
        ops.fmul(x, fade[2 * (i // size % columns) + i % 2])
        for i, x in enumerate(registers)
    ]
