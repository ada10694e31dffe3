"""Files of `maps/`: which positions the first item of a cell kept, read strictly."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from kvjax.files import parse_json, read_text
from kvjax.messages import shown

MOST_BYTES = 2**30
"""Of one file: a long prompt in a deep model with many heads."""


def read_map(file: pathlib.Path) -> Mapping[str, Any]:
    """A map as the report needs it.

    Raises:
        ValueError: it is cut off or damaged; names the file.
    """
    remedy = "Delete it; the report does without."
    try:
        found = parse_json(read_text(file, MOST_BYTES), str(file))
    except ValueError as wrong:
        raise ValueError(f"{wrong} {remedy}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no map but {shown(found)}. {remedy}")
    for name, (holds, kind) in _FIELDS.items():
        if not holds(found.get(name)):
            raise ValueError(
                f"{file}: {name!r} must be {kind}; got {shown(found.get(name))}. "
                f"{remedy}"
            )
    pieces = len(found.get("tokens") or found["text"])
    # Without `tokens`, one position more is the mark of the beginning.
    most = pieces if found.get("tokens") else pieces + 1
    last = max((p for layer in found["kept"] for h in layer for p in h), default=0)
    if last >= most:
        raise ValueError(
            f"{file}: 'kept' has position {shown(last)} of {most}. {remedy}"
        )
    return found


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _maybe_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _share(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or number and 0 <= value <= 1


def _texts(value: Any) -> bool:
    return value is None or isinstance(value, list) and all(map(_text, value))


def _positions(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    layers = all(isinstance(layer, list) and layer for layer in value)
    heads = layers and all(isinstance(head, list) for layer in value for head in layer)
    return heads and all(
        type(p) is int and p >= 0 for layer in value for head in layer for p in head
    )


_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("text", "compression", "task"), (_text, "a text")),
    "question": (_maybe_text, "a text or null"),
    "keep": (_share, "a number in [0, 1] or null"),
    "tokens": (_texts, "a list of texts or null"),
    "kept": (_positions, "a list of layers, of heads, of positions"),
}
