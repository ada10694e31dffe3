"""Block sizes per op and chip, as data: `tuned/<op>.json`."""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

_FOLDER = pathlib.Path(__file__).parent / "tuned"


@functools.cache
def table(op: str) -> Mapping[str, Any]:
    """What the file of an op holds: `default`, chips, and `source`."""
    return json.loads((_FOLDER / f"{op}.json").read_text(encoding="utf-8"))


def tiles(
    op: str, target: str | None = None, given: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Block sizes of an op: the chip's, or the default; `given` entries win.

    Raises:
        ValueError: `given` names a block size that the op does not have.
    """
    known = table(op)
    out = dict(known.get(target or "default", known["default"]))
    for name, value in (given or {}).items():
        if name not in out:
            raise ValueError(f"`tiles` of {op} may have {sorted(out)}; got {name!r}.")
        out[name] = value
    return out
