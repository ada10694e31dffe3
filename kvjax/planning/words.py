"""A plan in sentences: whether it fits, and what to change where it does not."""

from collections.abc import Sequence

from kvjax.pallas_kernels.targets import TARGETS
from kvjax.planning.chips import HERE, Chip
from kvjax.planning.record import Layers, Plan, Row


def size(bytes_: int) -> str:
    """`16.1 GB`, of 10**9 bytes."""
    for unit, of in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(bytes_) >= of:
            return f"{bytes_ / of:,.1f} {unit}"
    return f"{bytes_:,} bytes"


def name_of(row: Row) -> str:
    """A compression and its budget."""
    return row.compression + ("" if row.keep is None else f" keep {row.keep:g}")


def headline(plan: Plan, chip: Chip) -> str:
    """The answer for one chip in a sentence, and what to change where it is no."""
    rows = plan.of(chip.name)
    first = rows[0]
    where = f"{chip.name} ({size(chip.memory)})"
    if plan.mesh:
        ways = " x ".join(f"{axis} {n}" for axis, n in plan.mesh.items())
        where = f"each chip of {where}, {ways}"
    asked = f"{plan.model}, {plan.context:,} tokens, batch {plan.batch:,} on {where}"
    if first.fits:
        plain = "" if first.compression == "none" else f"with {name_of(first)} "
        return f"{asked}: {plain}{_fits(first)}."
    lacks = f"{asked}: {_short(first)}"
    fitting = [row for row in rows if row.fits]
    if fitting:
        best = max(fitting, key=lambda row: row.peak)
        return f"{lacks}. With {name_of(best)}: {_fits(best)}."
    return f"{lacks}. {_remedy(plan, chip, rows)}"


def _short(row: Row) -> str:
    plain = "" if row.compression == "none" else f"with {name_of(row)} "
    return f"{plain}does not fit (needs {size(row.peak)})"


def _fits(row: Row) -> str:
    return f"fits, {size(row.free)} free; {bounds(row)}"


def bounds(row: Row) -> str:
    """The largest context and the largest batch of a row."""
    why = " (the model's range)" if row.context_bound == "model" else ""
    more = " or more" if row.batch_bound == "search" else ""
    return (
        f"largest context {row.largest_context:,}{why}, largest batch "
        f"{row.largest_batch:,}{more}"
    )


def _remedy(plan: Plan, chip: Chip, rows: Sequence[Row]) -> str:
    """What is possible, and what to change, where nothing fits."""
    least = min(rows, key=lambda row: row.peak)
    said = []
    if len(rows) > 1:
        said.append(
            f"Nothing asked for does: {name_of(least)} needs least, {size(least.peak)}."
        )
    longest = max(rows, key=lambda row: row.largest_context)
    if least.weights >= chip.memory:
        said.append(
            f"The weights alone are {size(least.weights)}: no compression of the cache "
            "helps."
        )
    elif longest.largest_context:
        said.append(
            f"With {name_of(longest)} up to {longest.largest_context:,} tokens fit at "
            "this batch."
        )
    larger = [
        target.name
        for target in sorted(TARGETS.values(), key=lambda t: t.usable_bytes)
        if target.usable_bytes >= least.peak and target.name != chip.name
    ]
    if larger and not plan.mesh:
        said.append(f"Chips with room for {name_of(least)}: {', '.join(larger)}.")
    else:
        said.append("Take more chips (`chips`), a shorter context, or fewer rows.")
    if chip.name == HERE:
        said.append("`device` names another chip.")
    return " ".join(said)


def layers_text(layers: Sequence[Layers]) -> str:
    """`28 of 34 layers hold 1,024 slots, 6 hold 32,768`."""
    alike: dict[int, int] = {}
    for kind in layers:
        alike[kind.slots] = alike.get(kind.slots, 0) + kind.count
    if len(alike) < 2:
        return ""
    total, (first, *rest) = sum(alike.values()), alike.items()
    more = "".join(f", {count} hold {slots:,}" for slots, count in rest)
    return f"{first[1]} of {total} layers hold {first[0]:,} slots{more}"
