"""The largest of what is asked for that still fits."""

from collections.abc import Callable

from kvjax.models.padding import widest

MOST_ROWS = 1 << 16
"""Rows up to which batches are looked at."""


def last_true(holds: Callable[[int], bool], count: int, guess: int) -> int:
    """The largest of `range(count)` at which `holds`, -1 if at none.

    `holds` is true up to some place and false from there on. Looked for from `guess`
    outwards in steps that double, then by halves: a good guess costs two looks.
    """
    low, high, step = -1, count, 1
    at = min(max(guess, 0), count - 1)
    while high - low > 1:
        if holds(at):
            low, toward = at, at + step
        else:
            high, toward = at, at - step
        step *= 2
        inside = low < toward < high
        known = low >= 0 and high < count
        at = toward if inside and not known else (low + high) // 2
    return low


def widths(most: int, new_tokens: int) -> tuple[int, ...]:
    """Contexts up to `most` at which a program gets wider, ascending.

    Prompts are padded (`models.padding`): all contexts up to the next of these need as
    much as it does.
    """
    found, prompt = [], 1
    while prompt + new_tokens <= most:
        wide = widest(prompt)
        found.append(min(wide + new_tokens, most))
        prompt = wide + 1
    return tuple(dict.fromkeys(found))
