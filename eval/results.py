"""The directory of a run: rows as Parquet, one file per cell, written atomically.

RUN/run.json               what ran: schema, versions, model, configuration
RUN/rows/<cell>.parquet    one row; its presence says that the cell is finished
RUN/items/<cell>.parquet   one row per item
RUN/maps/<cell>.json       which positions the first item kept, see `kvjax.eval.maps`
"""

import dataclasses
import errno
import fnmatch
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from kvjax import inputs
from kvjax.eval.config import EvalConfig
from kvjax.eval.header import RECORD, read_header
from kvjax.eval.rows import ITEMS, REMEDY, ROWS, parquet_bytes, read_rows
from kvjax.files import is_full, write_bytes
from kvjax.messages import shown
from kvjax.places import check_place, clear_left

KINDS = ("rows", "items", "maps")
_COMPARED = ("schema", "model_fingerprint", "config")
_NOTED = ("model_fingerprint", "inputs", "checkpoint")
"""What a call that goes on writes anew, once it is known to be of the same contents."""


@dataclasses.dataclass(frozen=True)
class RunWriter:
    """A run directory that is open for writing."""

    path: pathlib.Path

    def row(self, about: Mapping[str, Any], items: int) -> dict[str, Any] | None:
        """The row of a finished cell, or None.

        Args:
            about: its columns that say which cell it is.
            items: how many it has.

        Raises:
            ValueError: a file of it is damaged, or of another cell.
        """
        paths = [self._file(kind, about["cell"]) for kind in ("rows", "items")]
        if not all(path.exists() for path in paths):
            return None
        (row,), found = map(read_rows, paths)
        for name, wanted in {**about, "items": items}.items():
            if row[name] != wanted:
                raise ValueError(
                    f"{paths[0]} is of another cell: {name!r} is {shown(row[name])} "
                    f"there and {shown(wanted)} here. {REMEDY}"
                )
        if [item["item"] for item in found] != [*range(items)]:
            raise ValueError(
                f"{paths[1]} is of another cell: it has {len(found)} items, or has "
                f"them in another order; expected {items}. {REMEDY}"
            )
        if any((item["reply"] is None) is (item["nll"] is None) for item in found):
            raise ValueError(
                f"{paths[1]} has items without a `reply` or an `nll`, or with both. "
                f"{REMEDY}"
            )
        return row

    def items(self, cell: str) -> list[dict[str, Any]]:
        """The items of a finished cell."""
        return read_rows(self._file("items", cell))

    def write(
        self,
        cell: str,
        row: Mapping[str, Any],
        items: Sequence[Mapping[str, Any]],
        kept: Mapping[str, Any] | None,
    ) -> None:
        """Finish a cell. The row goes last: a cell without one runs again."""
        if kept is not None:
            text = json.dumps(kept, separators=(",", ":"))
            _write(self.path / "maps" / f"{cell}.json", text.encode())
        _write(self._file("items", cell), parquet_bytes(items, ITEMS))
        _write(self._file("rows", cell), parquet_bytes([row], ROWS))

    def _file(self, kind: str, cell: str) -> pathlib.Path:
        return self.path / kind / f"{cell}.parquet"


def check_directory(
    directory: str | os.PathLike[str], config: EvalConfig | None = None
) -> None:
    """A run can be written to the directory; nothing is made or changed.

    Args:
        directory: of the run.
        config: what is run; a run that is there must be of the same. None: any.

    Raises:
        ValueError: it cannot be written to, or holds another run or something else.
    """
    path = pathlib.Path(directory)
    check_place(path)
    for kind in KINDS:
        if os.path.lexists(path / kind) and not (path / kind).is_dir():
            raise ValueError(
                f"{path / kind} is no directory, and a run keeps files in it. Move it "
                "away, or use another directory."
            )
    if (path / RECORD).exists():
        old = read_header(path)
        if config is not None:
            new = _plain({"config": dataclasses.asdict(config)})
            _check_same(path, {"config": old.get("config")}, new)
    elif path.is_dir() and any(not _ours(one.name) for one in path.iterdir()):
        raise ValueError(
            f"{path} is not empty and holds no {RECORD}. Give a new directory."
        )


def _ours(name: str) -> bool:
    """Whether a file is there before `run.json` is."""
    return fnmatch.fnmatch(name, f".{RECORD}.*.tmp")


def open_run(directory: str | os.PathLike[str], header: Mapping[str, Any]) -> RunWriter:
    """A new run, or an earlier one that goes on where it stopped.

    The caller holds the directory, see `kvjax.places.held`.

    Raises:
        ValueError: the directory holds another run, or something else; an input of
            the run has changed since.
        OSError: it cannot be written.
    """
    path = pathlib.Path(directory)
    check_directory(path)
    record, new = path / RECORD, _plain(header)
    before = read_header(path) if record.exists() else {}
    old, sampled = before, new.pop("sampled_fingerprint", None)
    if old:
        if sampled is not None and sampled == old.get("model_fingerprint"):
            old = old | {"model_fingerprint": new["model_fingerprint"]}
        _check_same(path, old, new)
        inputs.check_same(old.get("inputs", {}), new.get("inputs", {}))
        new = old | {name: new[name] for name in _NOTED if name in new}
    path.mkdir(parents=True, exist_ok=True)
    if new != before:
        _write(record, (json.dumps(new, indent=2) + "\n").encode())
    kinds = [path / kind for kind in KINDS]
    for kind in kinds:
        kind.mkdir(exist_ok=True)
    clear_left(path, *kinds)
    return RunWriter(path)


def _plain(tree: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has it."""
    return json.loads(json.dumps(tree))


def load_rows(run_dir: str | os.PathLike[str]) -> pa.Table:
    """The rows of all finished cells, in the order of their names.

    Raises:
        ValueError: not a run directory, another schema, or a damaged file (named).
    """
    read_header(run_dir)
    files = sorted((pathlib.Path(run_dir) / "rows").glob("*.parquet"))
    return pa.Table.from_pylist([row for one in files for row in read_rows(one)], ROWS)


def _check_same(path: pathlib.Path, old: Mapping, new: Mapping) -> None:
    for name in _COMPARED:
        if name not in new:
            continue
        differences = "; ".join(_differences(name, old.get(name), new.get(name)))
        if differences:
            raise ValueError(
                f"{path} holds another run: {differences}. Use another directory, or "
                "delete this one to start over."
            )


def _differences(name: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            line
            for key in keys
            for line in _differences(f"{name}.{key}", old.get(key), new.get(key))
        ]
    return [] if old == new else [f"{name} is {shown(old)} there and {shown(new)} now"]


def _write(path: pathlib.Path, data: bytes) -> None:
    """All of the file or none of it."""
    try:
        write_bytes(path, data)
    except OSError as wrong:
        why = os.strerror(wrong.errno) if wrong.errno else str(wrong)
        remedy = "Free some space" if is_full(wrong) else "Fix that"
        raise OSError(
            wrong.errno or errno.EIO,
            f"{why} while writing {len(data)} bytes. Finished cells are kept: {remedy} "
            "and run the same evaluation again",
            str(path),
        ) from None
