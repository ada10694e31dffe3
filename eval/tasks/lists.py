"""Texts that show a list of texts, as JSON, Python and NumPy print it."""

import ast
import re
import warnings

_ITEM = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_ITEMS = re.compile(rf"\[\s*(?:(?:{_ITEM})\s*(?:,\s*)?)++\]", re.DOTALL)


def listed(text: str) -> list[str] | None:
    """The items of `["a", "b"]`, `['a', 'b']` or `['a' 'b']`; None of other texts.

    NumPy prints no commas, which Python would read as one long text. Items that are
    no texts in quotes make no list: `[1, 2]` is an answer of its own.
    """
    text = text.strip()
    if not _ITEMS.fullmatch(text):
        return None
    items = [one[0] for one in re.finditer(_ITEM, text, re.DOTALL)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of `\d`, which is no escape
            return [ast.literal_eval(one) for one in items]
    except (SyntaxError, ValueError):  # a line break or a damaged escape inside of one
        return None
