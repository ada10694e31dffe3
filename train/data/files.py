"""Records of local files, one after the other, each with where it stands.

What is wrong with a file is told by its name, the row and the cause. Only the columns
that are asked for are read: what else is in a file may differ from row to row.
"""

import codecs
import gzip
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

from kvjax.messages import nearest, shown
from kvjax.plaintext import MARK, marked

PLACE, RECORD = "place of the record", "record as JSON"
"""Columns of what is read: JSON, so that no row is filled up with another's keys."""

ESCAPED = re.compile("[\udc80-\udcff]")
"""Bytes that are not UTF-8, as Python escapes them."""

AHEAD = 100
"""Records of a stream that are read to see which columns there are."""

Options = Mapping[str, Any]
"""How files are read: `kind`, `columns`, `encoding`, `field`, `sample_by`."""

Placed = Iterator[tuple[str, Any]]
"""Where a record stands in its file, and the record."""


def records(files: Sequence[tuple], options: Options) -> Iterator[dict[str, str]]:
    """The records of files as `datasets` keeps them.

    Args:
        files: paths, and what else tells a file from what it was before.
        options: how they are read.

    Raises:
        ValueError: a file that cannot be read, a row that is no record, a column that
            a file does not have.
    """
    for path, *_ in files:
        for place, record in read(path, options):
            try:
                kept = json.dumps(record, default=_plain)
            except (ValueError, TypeError, RecursionError) as wrong:
                raise Faulty(f"{place}: {_cause(wrong)}.") from wrong
            yield {PLACE: place, RECORD: kept}


def check_columns(files: Sequence[tuple], options: Options) -> None:
    """The first records of the first file that has any hold every column.

    Raises:
        ValueError: they do not; as `records` does, besides.
    """
    for path, *_ in files:
        if list(read(path, options, most=AHEAD)):
            return


def read(path: str, options: Options, most: int | None = None) -> Placed:
    """The columns of each record of a file, of the first `most`."""
    columns: Sequence[str] = options["columns"]
    seen: set[str] = set()
    known: dict[str, None] = {}
    try:
        found = KINDS[options["kind"]](path, options)
        for where, record in itertools.islice(found, most):
            if not isinstance(record, Mapping):
                raise ValueError(f"{where}: expected an object; got {shown(record)}")
            if len(known) < 100:
                known.update(dict.fromkeys(record))
            seen.update(column for column in columns if column in record)
            place = f"{path}, {where}" if where else path
            yield place, {name: record.get(name) for name in columns}
        if known:
            _complete(columns, seen, list(known))
    except Faulty:
        raise
    # Readers raise whatever their layers raise.
    except Exception as wrong:
        kind = "" if isinstance(wrong, ValueError) else f"{type(wrong).__name__}: "
        said = str(wrong).strip().rstrip(".")[:400] or "it cannot be read"
        raise Faulty(f"{path}: {kind}{said}.") from wrong


class Faulty(ValueError):
    """What is wrong with a file."""


def _complete(columns: Iterable[str], seen: set[str], known: list[str]) -> None:
    for column in columns:
        if column not in seen:
            raise ValueError(
                f"no column {column!r}; it has {sorted(map(str, known))[:20]}."
                f"{nearest(column, map(str, known))}"
            )


def _plain(value: Any) -> Any:
    """What JSON has nothing for: a time as text, else what nobody takes for text."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return {f"<{type(value).__name__}>": None}


def _opened(path: str, encoding: str) -> IO[str]:
    """A file as text. What is not UTF-8 is escaped, for `_lines` to find."""
    raw: Any = gzip.open(path) if path.endswith(".gz") else open(path, "rb")
    name = marked(raw.peek(4)[:4])
    if not encoding and name not in ("", "utf-8"):
        raw.close()
        raise ValueError(
            f"it begins as {name.upper()} text does; give the source `encoding: {name}`"
        )
    kind = codecs.lookup(encoding or "utf-8").name
    errors = "surrogateescape" if kind.startswith("utf-8") else "strict"
    return io.TextIOWrapper(raw, encoding=kind, errors=errors)


def _lines(path: str, encoding: str) -> Iterator[tuple[int, str]]:
    """Number and text of each line, without a mark before the first one."""
    number = 0
    with _opened(path, encoding) as file:
        while True:
            try:
                line = file.readline()
            except UnicodeError as wrong:
                raise ValueError(
                    f"behind line {number}: not {encoding} ({wrong})"
                ) from wrong
            if not line:
                return
            number += 1
            if not line.isascii() and (bad := ESCAPED.search(line)):
                raise ValueError(
                    f"line {number}: byte 0x{ord(bad[0]) - 0xDC00:02x} is not UTF-8; "
                    "give the source its `encoding` (latin-1, say)"
                )
            yield number, line.removeprefix(MARK) if number == 1 else line


def _json(path: str, options: Options) -> Placed:
    """One object a line, or one list of objects (in `field` of an object)."""
    lines = _lines(path, options["encoding"])
    full = ((number, line) for number, line in lines if line.strip())
    first = next(full, None)
    if first is None:
        return
    if options["field"] or first[1].lstrip().startswith("["):
        rest = "".join(line for _, line in lines)
        if options["field"] or not (rest.strip() and _whole(first[1])):
            yield from _listed(
                "\n" * (first[0] - 1) + first[1] + rest, options["field"]
            )
            return
    for number, line in itertools.chain([first], full):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as wrong:
            whole = _object(path, options) if number == first[0] else None
            if whole is None:
                raise ValueError(f"line {number}: {_cause(wrong)}") from wrong
            yield "", whole
            return
        yield f"line {number}", record


def _whole(line: str) -> bool:
    """Whether a line is JSON by itself."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _object(path: str, options: Options) -> dict[str, Any] | None:
    """A file that is one object over several lines."""
    try:
        whole = json.loads("".join(x for _, x in _lines(path, options["encoding"])))
    except (ValueError, RecursionError):
        return None
    return whole if isinstance(whole, dict) else None


def _listed(text: str, field: str) -> Placed:
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as wrong:
        raise ValueError(_cause(wrong, "line")) from wrong
    if field:
        if not isinstance(tree, dict) or field not in tree:
            raise ValueError(f"no field {field!r} in it; it holds {shown(tree)}")
        tree = tree[field]
    if not isinstance(tree, list):
        raise ValueError(f"expected a list of records; got {shown(tree)}")
    for number, record in enumerate(tree, 1):
        yield (
            f"record {number}",
            {"text": record} if isinstance(record, str) else record,
        )


def _cause(wrong: Exception, line: str = "") -> str:
    if isinstance(wrong, json.JSONDecodeError):
        where = f"{line} {wrong.lineno}, " if line else ""
        return f"{where}column {wrong.colno}: no JSON ({wrong.msg})"
    if isinstance(wrong, RecursionError):
        return "JSON that is nested too deeply"
    return f"no JSON ({wrong})"


def _parquet(path: str, options: Options) -> Placed:
    import pyarrow.parquet as pq

    columns = options["columns"]
    with pq.ParquetFile(path) as table:
        names = table.schema_arrow.names
        _complete(columns, set(names), names)
        number = 0
        batches = table.iter_batches(batch_size=256, columns=list(columns))
        while True:
            try:
                rows = next(batches, None)
                held = None if rows is None else rows.to_pylist()
            except Exception as wrong:
                raise ValueError(f"behind row {number}: {wrong}") from wrong
            if held is None:
                return
            for record in held:
                number += 1
                yield f"row {number}", {k: unfilled(x) for k, x in record.items()}


def unfilled(value: Any) -> Any:
    """A column's value without the keys that Arrow filled up with None.

    In a table every object of a column has the keys of all. What was None from the
    start cannot be told from that, and templates want such keys gone.
    """
    if isinstance(value, Mapping):
        return {k: unfilled(x) for k, x in value.items() if x is not None}
    return [unfilled(x) for x in value] if isinstance(value, list) else value


def _text(path: str, options: Options) -> Placed:
    """Documents of plain text."""
    lines = _lines(path, options["encoding"])
    by = options["sample_by"]
    if by == "document":
        yield "", {"text": "".join(line for _, line in lines)}
    elif by == "line":
        for number, line in lines:
            yield f"line {number}", {"text": line.removesuffix("\n")}
    else:
        yield from _paragraphs(lines)


def _paragraphs(lines: Iterable[tuple[int, str]]) -> Placed:
    """What stands between empty lines."""
    part: list[str] = []
    begin = 1
    for number, line in lines:
        if line != "\n":
            begin = begin if part else number
            part.append(line)
        elif part:
            yield f"line {begin}", {"text": "".join(part).removesuffix("\n")}
            part = []
    if part:
        yield f"line {begin}", {"text": "".join(part)}


KINDS = {"json": _json, "parquet": _parquet, "text": _text}
