"""`run.json` of an evaluation: what ran, as JSON of known types."""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from kvjax.files import read_json
from kvjax.messages import shown

SCHEMA = 3
RECORD = "run.json"


def read_header(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """What `run.json` says.

    Raises:
        ValueError: it is missing, not JSON, of another schema, or holds values of
            other types.
    """
    path = pathlib.Path(run_dir) / RECORD
    if not path.exists():
        raise ValueError(
            f"{run_dir} holds no {RECORD}: it is not the directory of an evaluation. "
            "Give the directory that `kvjax eval` wrote."
        )
    try:
        header = read_json(path)
    except ValueError as wrong:
        raise ValueError(
            f"{wrong} Restore it, or evaluate again into another directory."
        ) from None
    found = header.get("schema")
    if isinstance(found, bool) or found != SCHEMA:
        raise ValueError(
            f"{path} has schema {shown(found)}; this version reads {SCHEMA}. Use the "
            "version that wrote it, or evaluate again into another directory."
        )
    for name, value in header.items():
        if not _KINDS.get(name, _anything)(value):
            raise ValueError(
                f"{path}: `{name}` is not what an evaluation writes: {shown(value)}. "
                "Restore the file, or evaluate again into another directory."
            )
    return header


def _anything(value: Any) -> bool:
    return True


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_text, value.values()))


def _digests(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _texts(one) and all(one.values()) for one in value.values()
    )


def _configuration(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    tasks = value.get("tasks", [])
    return isinstance(tasks, list) and all(
        isinstance(one, str)
        or isinstance(one, dict)
        and _text(one.get("name"))
        and _text(one.get("label", ""))
        for one in tasks
    )


_KINDS: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("model", "dtype", "device", "date", "model_fingerprint"), _text),
    "source": _text,
    "config": _configuration,
    "inputs": _digests,
    "checkpoint": _texts,
}
"""What the values of `run.json` have to be."""
