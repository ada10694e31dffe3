"""Of texts of any size, the one that is as long as it may be."""

from collections.abc import Callable

TRIES = 12
ENOUGH = 0.98
"""Share of the length that is not worth another try."""


def fitted[E](
    make: Callable[[int], E],
    measure: Callable[[E], int],
    *,
    smallest: int,
    most: int,
    what: str,
) -> E:
    """The largest of `make(size)` that measures `most` or less, or nearly.

    Lengths grow about linearly with sizes, so a few tries find it.

    Args:
        make: what is made of a size.
        measure: how long that is.
        smallest: a size that should fit.
        most: how long it may be.
        what: how errors call it.

    Raises:
        ValueError: what is made of the smallest size is too long.
    """
    best = make(smallest)
    low, short = smallest, measure(best)
    if short > most:
        raise ValueError(
            f"{what} does not fit into a length of {most}: it needs {short}. Raise the "
            "length, or ask it for less (`fields`)."
        )
    high, size = None, max(2 * smallest, smallest + 16)
    for _ in range(TRIES):
        made = make(size)
        long = measure(made)
        slope = max((long - short) / (size - low), 1e-9)
        if long <= most:
            if long <= short and size > 4 * low:  # it does not grow
                return best if long < short else made
            best, low, short = made, size, long
        else:
            high = size
        if short >= ENOUGH * most or (high is not None and high - low <= 1):
            break
        size = low + max(1, min(int((most - short) / slope), 16 * low + 64))
        if high is not None:
            size = min(size, high - 1)
            size = size if size > low else (low + high) // 2
    return best
