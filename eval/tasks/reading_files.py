"""Records of published data: Parquet, JSON lines, CSV, or a data set of the hub.

Everything is read strictly: what is missing, empty or damaged is told by its file, its
row and its column, before anything is computed.
"""

import csv
import gzip
import io
import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvjax.eval.tasks.row import Record as Record
from kvjax.files import parse_json, regular
from kvjax.messages import nearest, shown
from kvjax.places import expanded
from kvjax.plaintext import decoded

PACKED = ".gz"
SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
"""Of files that are read; all but Parquet may be packed (`.jsonl.gz`)."""

REQUIRED, NULLABLE, OPTIONAL = "required", "nullable", "optional"

Rows = Iterator[tuple[str, Mapping[str, Any]]]
"""Where a record stands in its file, and the record."""


def read_records(
    path: str | os.PathLike[str],
    columns: Sequence[str],
    *,
    nullable: Sequence[str] = (),
    optional: Sequence[str] = (),
    config: str = "",
    split: str = "test",
    field: str = "path",
) -> list[Record]:
    """All records of a file, of a folder's files of one split, or of a hub data set.

    Args:
        path: a file (`SUFFIXES`), a folder, or a hub id (`owner/name`), which is read
            through `datasets` and kept on disk by it.
        columns: those that every row must have; `answer|answers` is whichever there
            is, under the first name.
        nullable: those that every row must have and that may be empty there; they are
            left out then.
        optional: further ones, left out where a row has none; as `columns`.
        config: of a hub id, its configuration; of a folder, the one below it.
        split: of a hub id or a folder (files whose names begin with it).
        field: what the path is a value of, for messages.

    Raises:
        ValueError: there is no such file, data set, configuration, split or column; a
            row lacks a column; a file is damaged or holds nothing.
    """
    needs = {REQUIRED: columns, NULLABLE: nullable, OPTIONAL: optional}
    wanted = [(one, need) for need, names in needs.items() for one in names]
    if not os.fspath(path):
        raise ValueError(f"`{field}` is empty; expected a file or a hub id.")
    place = expanded(path)
    try:
        there = os.path.lexists(place)
    except ValueError as wrong:  # a name with NUL in it
        raise ValueError(f"`{field}` is no path ({wrong}).") from None
    if os.path.isdir(place):  # `Path.is_dir` raises for names that are too long
        files = _of_folder(place, config, split)
    elif there or _suffix(place) or str(path).count("/") != 1:
        files = [_known(place, field)]
    else:
        return list(_records(_hub(str(path), config, split), wanted))
    found: list[Record] = []
    for file in files:
        found += _records(_of_file(file), wanted)
    if not found:
        raise ValueError(f"{files[0]} holds no records.")
    return found


def _records(rows: Rows, wanted: Sequence[tuple[str, str]]) -> Iterator[Record]:
    for place, row in rows:
        values = {}
        for column, need in wanted:
            names = column.split("|")
            name = next((one for one in names if row.get(one) is not None), None)
            if name is not None:
                values[names[0]] = row[name]
            elif need == REQUIRED or need == NULLABLE and not row.keys() & {*names}:
                raise _lacking(place, names, row)
        yield Record(place=place, values=values)


def _lacking(place: str, names: Sequence[str], row: Mapping[str, Any]) -> ValueError:
    for name in names:
        if name in row:
            return ValueError(f"{place}: `{name}` is empty; every row needs one.")
    known = [str(name) for name in row]
    said = " or ".join(f"`{name}`" for name in names)
    return ValueError(
        f"{place}: there is no column {said}; it has {shown(sorted(known))}."
        f"{nearest(names[0], known)}"
    )


def _suffix(file: pathlib.Path) -> str:
    """How the name of a file ends, unpacked; empty for what is not read."""
    packed = file.suffix.lower() == PACKED
    suffix = (pathlib.Path(file.stem) if packed else file).suffix.lower()
    known = suffix in SUFFIXES and not (packed and suffix == ".parquet")
    return suffix if known else ""


def _known(file: pathlib.Path, field: str) -> pathlib.Path:
    if not _suffix(file):
        raise ValueError(
            f"`{field}` must be a file that ends in {', '.join(SUFFIXES)} (all but "
            f"Parquet may be packed: .jsonl.gz), a folder of these, or a hub id "
            f"(owner/name); got {shown(str(file))}."
        )
    return regular(file)


def _of_folder(folder: pathlib.Path, config: str, split: str) -> list[pathlib.Path]:
    try:
        return _of_split(folder, config, split)
    except OSError as wrong:
        raise ValueError(f"{folder} cannot be listed: {wrong.strerror}.") from None


def _of_split(folder: pathlib.Path, config: str, split: str) -> list[pathlib.Path]:
    """The files of a split, as copies of hub data sets have them."""
    for below in (folder / config, folder / "data" / config, folder / config / "data"):
        if not below.is_dir():
            continue
        there = sorted(one for one in below.iterdir() if _suffix(one))
        files = [one for one in there if _begins(one.name, split)]
        kinds = {_suffix(one) for one in files}
        if len(kinds) > 1:
            raise ValueError(
                f"{below} has files of the split {shown(split)} that end in "
                f"{sorted(kinds)}. Give the one that is meant."
            )
        if files:
            return [regular(one) for one in files]
    place = folder / config if (folder / config).is_dir() else folder
    there = sorted(one.name for one in place.iterdir())
    raise ValueError(
        f"{folder / config} has no file of the split {shown(split)} (a name that "
        f"begins with it and ends in {', '.join(SUFFIXES)}); "
        f"{place} has {shown(there) if there else 'nothing'}. Give `config` and "
        "`split`, or a file."
    )


def _begins(name: str, split: str) -> bool:
    """`test.jsonl`, `test-00000-of-00002.parquet`, but not `testing.jsonl`."""
    return name.startswith(split) and not name[len(split) : len(split) + 1].isalnum()


def _of_file(file: pathlib.Path) -> Rows:
    suffix = _suffix(file)
    read = {".parquet": _parquet, ".json": _json, ".csv": _csv, ".tsv": _csv}
    for where, row in read.get(suffix, _lines)(file):
        place = f"{file}, {where}"
        if not isinstance(row, Mapping):
            raise ValueError(f"{place}: expected an object; got {shown(row)}.")
        yield place, row


def _text(file: pathlib.Path) -> str:
    try:
        data = file.read_bytes()
        if file.suffix.lower() == PACKED:
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as wrong:
        raise ValueError(f"{file} cannot be read; is it whole? ({wrong})") from None
    return decoded(data, str(file))


def _lines(file: pathlib.Path) -> Rows:
    for number, line in enumerate(_text(file).split("\n"), 1):
        if line.strip():
            where = f"line {number}"
            yield where, parse_json(line, f"{file}, {where}")


def _json(file: pathlib.Path) -> Rows:
    found = parse_json(_text(file), str(file))
    if not isinstance(found, list):
        raise ValueError(f"{file} must hold a list of records; got {shown(found)}.")
    for number, row in enumerate(found, 1):
        yield f"record {number}", row


def _csv(file: pathlib.Path) -> Rows:
    tabs = "\t" if _suffix(file) == ".tsv" else ","
    before = csv.field_size_limit(2**31 - 1)  # contexts are longer than its 131,072
    try:
        text = io.StringIO(_text(file), newline="")
        table = csv.DictReader(text, delimiter=tabs, strict=True)
        _check_once(file, [name for name in table.fieldnames or () if name])
        for number, row in enumerate(table, 1):
            if None in row:
                raise ValueError(f"{file}, row {number}: more values than columns.")
            yield f"row {number}", {k: v or None for k, v in row.items()}
    except csv.Error as wrong:
        raise ValueError(f"{file} is not CSV; is it whole? ({wrong})") from None
    finally:
        csv.field_size_limit(before)


def _parquet(file: pathlib.Path) -> Rows:
    import pyarrow
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file) as table:
            _check_once(file, table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=256):
                for row in _plain(batch, file, number):
                    number += 1
                    yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as wrong:
        raise ValueError(
            f"{file} cannot be read behind row {number}; is it whole? "
            f"({str(wrong)[:300]})"
        ) from None


def _plain(batch: Any, file: pathlib.Path, before: int) -> list[dict[str, Any]]:
    """The rows of a batch, `before` of the file in front of it."""
    columns: dict[str, list[Any]] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            columns[name] = column.to_pylist()
        except (ValueError, TypeError, LookupError, ArithmeticError) as wrong:
            rows = f"rows {before + 1} to {before + len(batch)}"
            raise ValueError(
                f"{file}, {rows}: the column {shown(name)} holds what cannot be read "
                f"({str(wrong)[:300]}). Is the file whole? Take the column out, or "
                "write it as text."
            ) from None
    return [
        dict(zip(columns, row, strict=True))
        for row in zip(*columns.values(), strict=True)
    ]


def _check_once(file: pathlib.Path, names: Sequence[str]) -> None:
    for at, name in enumerate(names):
        if name in names[:at]:
            raise ValueError(f"{file} has two columns {shown(name)}. Take one out.")


def _hub(name: str, config: str, split: str) -> Rows:
    import datasets

    which = f", configuration {shown(config)}" if config else ""
    what = f"data set {shown(name)}{which}, split {shown(split)}"
    try:
        found: Any = datasets.load_dataset(name, config or None, split=split)
    except Exception as wrong:  # the hub raises whatever its layers raise
        said = " ".join(str(wrong).split())[:600] or type(wrong).__name__
        raise ValueError(
            f"{what}: {said.rstrip('.')}. Without a network only what `datasets` has "
            "read before is there (HF_HOME); a Parquet or JSONL file of it can be "
            "given instead. Is the name of a file meant? There is none of this name. "
            "`config` and `split` choose what a data set has several of."
        ) from None
    for number, row in enumerate(found, 1):
        yield f"{what}, row {number}", row
