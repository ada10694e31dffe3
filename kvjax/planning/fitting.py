"""The mildest form of a compression that fits."""

from collections.abc import Mapping

from kvjax.compress.config import Compression
from kvjax.planning.chips import Chip
from kvjax.planning.planner import Planner
from kvjax.planning.search import last_true

STEPS = 100
"""Budgets are looked at in hundredths."""

BITS = (1, 2, 3, 4, 8)


def mildest(
    planner: Planner,
    asked: Mapping[str, Compression],
    context: int,
    batch: int,
    chip: Chip,
) -> dict[str, Compression]:
    """Each compression at the largest budget that fits, or with the most bits.

    What has no budget and no codes stays as it is, and so does what fits with none, or
    whose budget bounds what is read alone; what has both keeps its bits.
    """
    found = {}
    for label, c in asked.items():
        forms = _forms(c)
        if not forms:
            found[label] = c
            continue

        def holds(index: int, forms: list[tuple[str, Compression]] = forms) -> bool:
            needs = planner.needs(forms[index][1], context, batch, chip.kind)
            return needs.peak <= chip.memory

        best = last_true(holds, len(forms), _guess(planner, c, context, batch, chip))
        said, chosen = forms[best] if best >= 0 else ("", c)
        if not _allowed(planner, chosen, context, batch):
            said, chosen = "", c
        found[label + said] = chosen
    return found


def _guess(
    planner: Planner, c: Compression, context: int, batch: int, chip: Chip
) -> int:
    """Where among its forms: a cache is about as large as its budget."""
    needs = planner.needs(c, context, batch, chip.kind)
    left = chip.memory - needs.peak + needs.held.total
    return int(STEPS * (c.keep or 0) * left / needs.held.total) - 1


def _forms(c: Compression) -> list[tuple[str, Compression]]:
    """From the strongest to the mildest, each with what its name does not say."""
    if c.has_budget and not c.reads_less:
        return [("", c.with_keep(n / STEPS)) for n in range(1, STEPS + 1)]
    forms = []
    for bits in BITS if any(codec.coded for codec in c.store.codecs) else ():
        try:
            forms.append((f", {bits} bits", c.with_bits(bits)))
        except ValueError:
            continue  # a codec without so many
    return forms


def _allowed(planner: Planner, c: Compression, context: int, batch: int) -> bool:
    try:
        planner.check(c, context, batch)
    except ValueError:
        return False
    return True
