"""Files of `maps/`, read strictly; see `kvjax.eval.maps` for what they hold."""

import math
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
    for name, fits in _MORE.items():
        if found.get(name) is not None and not fits(found, found[name]):
            raise ValueError(
                f"{file}: {name!r} is not what an evaluation writes: "
                f"{shown(found[name])}. {remedy}"
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


def _number(value: Any) -> bool:
    whole = type(value) is int and abs(value) < 2**63
    return whole or isinstance(value, float)


def _following(entry: Mapping[str, Any], value: Any) -> bool:
    """Texts of tokens, and numbers of all but the first."""
    if not isinstance(value, dict) or not _texts(value.get("tokens") or None):
        return False
    count = len(value["tokens"] or ()) - 1
    return count > 0 and all(
        isinstance(value.get(name), list)
        and len(value[name]) == count
        and all(map(_number, value[name]))
        for name in ("nll", "nll_full", "kl", "agrees")
    )


def _departures(entry: Mapping[str, Any], value: Any) -> bool:
    """Texts of later tokens, when was looked, and when each head lost each token."""
    if not isinstance(value, dict) or not isinstance(value.get("tokens"), list):
        return False
    times, later = value.get("times"), value["tokens"]
    if not _texts(later) or not isinstance(times, list) or not times:
        return False
    if any(type(t) is not int for t in times) or times[0] != 0:
        return False
    if sorted(set(times)) != times or times[-1] != len(later):
        return False
    known = {None, *times}
    return _shaped(
        entry,
        value.get("left"),
        len(later),
        lambda n: (n is None or type(n) is int) and n in known,
    )


def _worth(entry: Mapping[str, Any], value: Any) -> bool:
    """A finite number for each token of each head."""
    return _shaped(entry, value, 0, lambda n: _number(n) and math.isfinite(n))


def _shaped(
    entry: Mapping[str, Any], value: Any, more: int, holds: Callable[[Any], bool]
) -> bool:
    """By layer and head of `kept`, one value for each token and `more`."""
    if not entry.get("tokens") or not isinstance(value, list):
        return False
    count = len(entry["tokens"]) + more
    heads = [len(layer) for layer in entry["kept"]]
    if [isinstance(layer, list) and len(layer) for layer in value] != heads:
        return False
    lines = [line for layer in value for line in layer]
    return all(
        isinstance(line, list) and len(line) == count and all(map(holds, line))
        for line in lines
    )


_MORE: Mapping[str, Callable[[Mapping[str, Any], Any], bool]] = {
    "following": _following,
    "departures": _departures,
    "worth": _worth,
}
"""What the first item of a cell may have besides."""
