"""How messages say things: values cut to a line, the name that was meant."""

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any


def nearest(name: Any, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the closest known name, or an empty string.

    What is no text, or longer than names are, is close to none.
    """
    if not isinstance(name, str) or len(name) > 200:
        return ""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


class _Bounded(reprlib.Repr):
    """Values of any size in a line."""

    def repr_int(self, x: int, level: int) -> str:
        digits = int(x.bit_length() * 0.30103) + 1
        return repr(x) if digits < 30 else f"an integer of about {digits} digits"


_BOUNDED = _Bounded(
    maxlevel=3, maxdict=6, maxlist=12, maxtuple=12, maxstring=120, maxother=200
)


def shown(value: Any) -> str:
    """`repr` of a value as messages print it: what is long or deep is cut."""
    text = _BOUNDED.repr(value)
    return text if len(text) <= 400 else f"{text[:396]} ..."
