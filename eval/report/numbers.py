"""Numbers as people read them, the same in figures, pages and tables."""

import math
import statistics
from collections.abc import Iterable


def bytes_label(value: float, _: int | None = None) -> str:
    """`48 KiB`: a byte count in the largest unit that keeps it at one or more."""
    units = ["B", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.3g} {units[0]}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share in percent; nothing where there is none (None, NaN)."""
    if share is None or math.isnan(share):
        return ""
    return f"{100 * share:.{digits}f}"


def mean_known(values: Iterable[float | None]) -> float | None:
    """Mean of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
