"""The directory of a run: rows as Parquet, one file per cell, written atomically.

RUN/run.json               what ran: schema, versions, model, configuration
RUN/rows/<cell>.parquet    one row; its presence says that the cell is finished
RUN/items/<cell>.parquet   one row per item
RUN/maps/<cell>.json       which positions the first item kept
"""

import dataclasses
import errno
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = 1

_text, _real, _whole = pa.string(), pa.float64(), pa.int64()

ROWS = pa.schema(
    [
        pa.field("cell", _text, nullable=False),
        ("model", _text),
        ("task", _text),
        ("length", _whole),
        ("depth", _real),
        ("compression", _text),
        ("overrides", _text),
        ("keep", _real),
        ("visibility", _text),
        ("items", _whole),
        ("score", _real),
        ("score_se", _real),
        ("agreement", _real),
        ("agreement_se", _real),
        ("resident_bytes", _real),
        ("full_bytes", _real),
        ("prefill_ms", _real),
        ("compress_ms", _real),
        ("ms_per_token", _real),
        ("compile_s", _real),
        ("seed", _whole),
        ("batch", _whole),
        ("nll", _real),
        ("kl", _real),
        ("schema", _whole),
        ("versions", _text),
        ("device", _text),
        ("date", _text),
    ]
)
"""One cell. `depth` is null but for the needle, `keep` for methods without a budget,
`score` for fidelity tasks, `nll` and `kl` for all others."""

ITEMS = pa.schema(
    [
        ("item", _whole),
        ("reply", _text),
        ("answer", _text),
        ("score", _real),
        ("agrees", _real),
        ("nll", _real),
        ("kl", _real),
    ]
)
"""One item of a cell. `agrees` is 0 or 1, or for fidelity tasks a share of tokens."""

_COMPARED = ("schema", "model_fingerprint", "config")


@dataclasses.dataclass(frozen=True)
class RunWriter:
    """A run directory that is open for writing."""

    path: pathlib.Path

    def row(self, cell: str) -> dict[str, Any] | None:
        """The row of a finished cell, or None.

        Raises:
            ValueError: a file of it is damaged.
        """
        paths = [self._file(kind, cell) for kind in ("rows", "items")]
        if not all(path.exists() for path in paths):
            return None
        row, _ = map(_read, paths)
        return row.to_pylist()[0]

    def items(self, cell: str) -> list[dict[str, Any]]:
        """The items of a finished cell."""
        return _read(self._file("items", cell)).to_pylist()

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
        _write(self._file("items", cell), _parquet(items, ITEMS))
        _write(self._file("rows", cell), _parquet([row], ROWS))

    def _file(self, kind: str, cell: str) -> pathlib.Path:
        return self.path / kind / f"{cell}.parquet"


def open_run(directory: str | os.PathLike[str], header: Mapping[str, Any]) -> RunWriter:
    """A new run, or an earlier one that goes on where it stopped.

    Raises:
        ValueError: the directory holds another run, or something else.
        OSError: it cannot be written.
    """
    path = pathlib.Path(directory)
    record = path / "run.json"
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; expected a directory for the run.")
    if record.exists():
        _check_same(path, read_header(path), json.loads(json.dumps(header)))
    elif path.is_dir() and any(path.iterdir()):
        raise ValueError(
            f"{path} is not empty and holds no run.json. Give a new directory."
        )
    for kind in ("rows", "items", "maps"):
        (path / kind).mkdir(parents=True, exist_ok=True)
        for left in (path / kind).glob(".*.tmp"):  # of a killed run
            left.unlink(missing_ok=True)
    if not record.exists():
        _write(record, (json.dumps(header, indent=2) + "\n").encode())
    return RunWriter(path)


def read_header(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """What `run.json` says.

    Raises:
        ValueError: it is missing, not JSON, or of another schema.
    """
    path = pathlib.Path(run_dir) / "run.json"
    if not path.is_file():
        raise ValueError(
            f"{run_dir} holds no run.json: it is not the directory of an evaluation. "
            "Give the directory that `kvjax eval` wrote."
        )
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as wrong:
        raise ValueError(
            f"{path} is not JSON ({wrong}). Run again elsewhere."
        ) from None
    found = header.get("schema") if isinstance(header, dict) else None
    if found != SCHEMA:
        raise ValueError(
            f"{path} has schema {found!r}; this version reads {SCHEMA}. Use the "
            "version that wrote it, or evaluate again into another directory."
        )
    return header


def load_rows(run_dir: str | os.PathLike[str]) -> pa.Table:
    """The rows of all finished cells, in the order of their names.

    Raises:
        ValueError: not a run directory, another schema, or a damaged file (named).
    """
    read_header(run_dir)
    files = sorted((pathlib.Path(run_dir) / "rows").glob("*.parquet"))
    return pa.concat_tables([ROWS.empty_table(), *map(_read, files)])


def _check_same(path: pathlib.Path, old: Mapping, new: Mapping) -> None:
    for name in _COMPARED:
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
    return [] if old == new else [f"{name} is {old!r} there and {new!r} now"]


def _read(path: pathlib.Path) -> pa.Table:
    try:
        table = pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as wrong:
        raise ValueError(
            f"{path} cannot be read ({str(wrong).splitlines()[0]}). Delete it and run "
            "the same evaluation again: only this cell is computed anew."
        ) from None
    schema = ITEMS if path.parent.name == "items" else ROWS
    if not table.schema.equals(schema) or (schema is ROWS and table.num_rows != 1):
        raise ValueError(
            f"{path} does not hold what an evaluation writes: {table.num_rows} rows of "
            f"{table.column_names}. Delete it and run the same evaluation again."
        )
    return table


def _parquet(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), buffer)
    return buffer.getvalue().to_pybytes()


def _write(path: pathlib.Path, data: bytes) -> None:
    """All of the file or none of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as wrong:
        temporary.unlink(missing_ok=True)
        why = os.strerror(wrong.errno) if wrong.errno else str(wrong)
        remedy = "Free some space" if wrong.errno == errno.ENOSPC else "Fix that"
        raise OSError(
            wrong.errno or errno.EIO,
            f"{why} while writing {len(data)} bytes. Finished cells are kept: {remedy} "
            "and run the same evaluation again",
            str(path),
        ) from None
