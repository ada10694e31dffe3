"""Rows and items of an evaluation as Parquet files, read strictly."""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kvjax.files import regular
from kvjax.messages import shown

LONGEST = 200
"""Bytes of a name of a cell, or of a part of it: files have it, and an ending."""

REMEDY = "Delete it and run the same evaluation again: only this cell is anew."

_word, _real, _whole = pa.string(), pa.float64(), pa.int64()

ROWS = pa.schema(
    [
        pa.field("cell", _word, nullable=False),
        ("model", _word),
        ("task", _word),
        ("length", _whole),
        ("depth", _real),
        ("turn", _whole),
        ("compression", _word),
        ("overrides", _word),
        ("keep", _real),
        ("visibility", _word),
        ("items", _whole),
        ("score", _real),
        ("score_se", _real),
        ("agreement", _real),
        ("agreement_se", _real),
        ("resident_bytes", _real),
        ("full_bytes", _real),
        ("host_bytes", _real),
        ("prefill_ms", _real),
        ("compress_ms", _real),
        ("ask_ms", _real),
        ("ms_per_token", _real),
        ("compile_s", _real),
        ("seed", _whole),
        ("source", _word),
        ("batch", _whole),
        ("nll", _real),
        ("kl", _real),
        ("schema", _whole),
        ("versions", _word),
        ("device", _word),
        ("date", _word),
    ]
)
"""One cell. `depth` is null but for the needle, `turn` (from 1) where one question is
asked, `keep` for methods without a budget, `score` for fidelity tasks, `nll` and `kl`
for all others. `host_bytes` are those of `resident_bytes` in the host's memory.
`ask_ms` is the time in which a batch reads its questions, `source` a digest of what is
asked."""

ITEMS = pa.schema(
    [
        ("item", _whole),
        ("reply", _word),
        ("answer", _word),
        ("score", _real),
        ("agrees", _real),
        ("nll", _real),
        ("kl", _real),
    ]
)
"""One item of a cell. `agrees` is 0 or 1, or for fidelity tasks a share of tokens."""


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file that an evaluation wrote.

    Raises:
        ValueError: it is damaged, or holds something else; names the file.
    """
    try:
        table = pq.ParquetFile(regular(path), page_checksum_verification=True).read()
        rows = table.to_pylist()
    # Whatever Arrow's readers make of damaged bytes, and Python of such text.
    except (pa.ArrowException, OSError, ValueError, TypeError, MemoryError) as wrong:
        said = (str(wrong).splitlines() or [type(wrong).__name__])[0][:200]
        raise ValueError(f"{path} cannot be read ({said}). {REMEDY}") from None
    schema = ITEMS if path.parent.name == "items" else ROWS
    if not table.schema.equals(schema) or (schema is ROWS and len(rows) != 1):
        raise ValueError(
            f"{path} does not hold what an evaluation writes: {len(rows)} rows of "
            f"{shown(table.column_names)}. {REMEDY}"
        )
    columns = _COLUMNS if schema is ROWS else _OF_ITEMS
    for row in rows:
        for name, holds in columns.items():
            if not holds(row[name]):
                raise ValueError(
                    f"{path}: {name!r} is {shown(row[name])}, which no evaluation "
                    f"writes. {REMEDY}"
                )
    return rows


def _text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value.encode()) <= LONGEST


def _size(value: Any) -> bool:
    return value is None or 0 < value < 2**63


def _from_zero(value: Any) -> bool:
    return value is not None and 0 <= value < math.inf


def _share(value: Any) -> bool:
    return value is None or 0 <= value <= 1


def _amount(value: Any) -> bool:
    """Of a model that diverged it may be no number."""
    return value is None or value >= 0 or math.isnan(value)


_COLUMNS: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("task", "compression", "visibility"), _text),
    **dict.fromkeys(("length", "turn", "items"), _size),
    **dict.fromkeys(("resident_bytes", "full_bytes"), _size),
    "host_bytes": _from_zero,
    **dict.fromkeys(("keep", "depth", "score", "agreement"), _share),
    **dict.fromkeys(("score_se", "agreement_se", "nll", "compile_s"), _amount),
    **dict.fromkeys(("prefill_ms", "compress_ms", "ask_ms", "ms_per_token"), _amount),
}
"""What the values of a row have to be."""

_OF_ITEMS: Mapping[str, Callable[[Any], bool]] = {
    "item": lambda value: value is not None,
    **dict.fromkeys(("score", "agrees"), _share),
    "nll": _amount,
}


def parquet_bytes(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> bytes:
    """A Parquet file whose pages have checksums."""
    buffer = pa.BufferOutputStream()
    table = pa.Table.from_pylist(list(rows), schema=schema)
    pq.write_table(table, buffer, write_page_checksum=True)
    return buffer.getvalue().to_pybytes()
