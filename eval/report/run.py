"""A run directory as the report sees it, and what its figures group by."""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from kvjax.eval.header import read_header
from kvjax.eval.report.maps import read_map
from kvjax.eval.report.numbers import mean_known
from kvjax.eval.results import load_rows

CellRow = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """What a finished or interrupted evaluation left behind.

    Attributes:
        path: the directory.
        about: contents of `run.json`.
        rows: one mapping per finished cell.
        maps: which positions the first item of a cell kept.
    """

    path: pathlib.Path
    about: Mapping[str, Any]
    rows: tuple[CellRow, ...]
    maps: tuple[Mapping[str, Any], ...]


def load_run(directory: str | pathlib.Path) -> LoadedRun:
    """Read a run directory.

    Raises:
        ValueError: it is no run directory, holds no finished cell, was written by
            another version, or a file of it is cut off.
    """
    path = pathlib.Path(directory)
    if not path.is_dir():
        raise ValueError(
            f"{path} is not a directory; expected one that `kvjax eval` wrote."
        )
    about = read_header(path)
    rows = load_rows(path).to_pylist()
    if not rows:
        raise ValueError(
            f"{path} holds no finished cell (rows/*.parquet). Run the same evaluation "
            "into it again: it goes on where it stopped."
        )
    maps = tuple(read_map(file) for file in sorted((path / "maps").glob("*.json")))
    return LoadedRun(path=path, about=about, rows=tuple(rows), maps=maps)


def methods(rows: Iterable[CellRow]) -> list[str]:
    """Method names in the order of the figures: reference, methods, floor."""
    names = dict.fromkeys(row["compression"] for row in rows)
    ends = {"none": -1, "random": 1}
    return sorted(names, key=lambda name: (ends.get(name, 0), name))


def group(rows: Iterable[CellRow], *names: str) -> dict[tuple, list[CellRow]]:
    """Rows by the values of some columns, in sorted order."""
    out: dict[tuple, list[CellRow]] = {}
    for row in rows:
        out.setdefault(tuple(row.get(name) for name in names), []).append(row)
    order = sorted(
        out, key=lambda key: [(v is None, 0 if v is None else v) for v in key]
    )
    return {key: out[key] for key in order}


def mean(rows: Iterable[CellRow], name: str) -> float | None:
    """Mean of a column over the rows that have it."""
    return mean_known(row.get(name) for row in rows)


def mean_se(rows: Iterable[CellRow], name: str) -> float:
    """Standard error of the mean of independent rows, from each row's own."""
    values = [row.get(name) or 0.0 for row in rows]
    return sum(value**2 for value in values) ** 0.5 / len(values)
