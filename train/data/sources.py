"""Datasets of a recipe: where they are, whether they hold what the recipe says."""

import glob
import pathlib
from typing import TYPE_CHECKING, Any

from kvjax.messages import nearest
from kvjax.train.recipe import Source

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


def open_dataset(source: Source, split: str) -> "Dataset | IterableDataset":
    """The records of a source, with the columns that are read and no others.

    A text file is one document, unless `fields` say otherwise (`sample_by`).

    Raises:
        ValueError: no such file, dataset, split or column; names the nearest column.
    """
    import datasets

    kind, files = _files(source.dataset)
    options: dict[str, Any] = {"split": split, "streaming": source.streaming}
    if kind == "text":
        options["sample_by"] = "document"
    if files:
        options["data_files"] = files
    try:
        records = datasets.load_dataset(
            kind or source.dataset, **{**options, **source.fields}
        )
    # Readers and the hub raise whatever their layers raise.
    except Exception as wrong:
        raise ValueError(
            f"dataset {source.dataset!r}, split {split!r}: {wrong}"
        ) from wrong
    known = records.column_names
    if known is None:  # a stream may not say before it is read
        known = list(next(iter(records), {}))
    for column in source.columns:
        if column not in known:
            raise ValueError(
                f"dataset {source.dataset!r} has no column {column!r}; it has "
                f"{sorted(known)}.{nearest(column, known)}"
            )
    return records.select_columns(list(source.columns))


def _files(name: str) -> tuple[str, list[str]]:
    """Builder and files of a local dataset; empty for a hub id."""
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        found = [p for p in sorted(path.rglob("*")) if p.suffix in BUILDERS]
    elif glob.has_magic(name):
        found = [pathlib.Path(p) for p in sorted(glob.glob(str(path)))]
    elif path.suffix in BUILDERS or path.exists():
        found = [path]
    else:
        return "", []
    missing = [p for p in found if not p.is_file()]
    if not found or missing:
        raise ValueError(
            f"dataset {name!r}: no such file. Expected a hub id, or files that end in "
            f"{', '.join(BUILDERS)}."
        )
    kinds = {BUILDERS.get(p.suffix) for p in found}
    if None in kinds or len(kinds) > 1:
        suffixes = sorted({p.suffix for p in found})
        raise ValueError(
            f"dataset {name!r} has files that end in {suffixes}; expected one kind of "
            f"{list(BUILDERS)}."
        )
    return str(kinds.pop()), [str(p) for p in found]
