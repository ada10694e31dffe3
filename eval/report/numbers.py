"""Numbers as people read them, the same in figures, pages and tables."""

import math
import statistics
from collections.abc import Iterable


def percent(share: float | None, digits: int = 1) -> str:
    """A share in percent; nothing where there is none (None, NaN)."""
    if share is None or math.isnan(share):
        return ""
    return f"{100 * share:.{digits}f}"


def mean_known(values: Iterable[float | None]) -> float | None:
    """Mean of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
