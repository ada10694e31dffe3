"""Numbers as people write them, compared by their value."""

import re
from fractions import Fraction

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_VALUE = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)"
_WHOLE = re.compile(rf"[-+]?{_VALUE}")
_INSIDE = re.compile(rf"(?:(?<![\w.)\]])[-+\u2212]\s?)?[$\u20ac\u00a3]?(?<!\d){_VALUE}")
MOST_DIGITS = 300


def number(text: str) -> Fraction | None:
    """The value of a text that is a number: `18`, `-1,234.50`, `$18.00`, `.5`.

    None for others, and for numbers of more digits than anybody means.
    """
    text = text.strip().replace("\u2212", "-")
    sign = text[:1] if text[:1] in ("-", "+") else ""
    text = sign + text[len(sign) :].strip().lstrip("$\u20ac\u00a3").strip()
    if len(text) > MOST_DIGITS or not text.isascii() or not _WHOLE.fullmatch(text):
        return None
    return Fraction(text.replace(",", ""))


def numbers(text: str) -> list[Fraction]:
    """The numbers in a text, in their order; `3-2` holds 3 and 2, `x = -2` holds -2."""
    found = (number(one[0]) for one in _INSIDE.finditer(text))
    return [one for one in found if one is not None]
