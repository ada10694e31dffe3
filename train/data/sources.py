"""Datasets of a recipe: where they are, whether they hold what the recipe says."""

import glob
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvjax.files import is_full
from kvjax.messages import nearest, shown
from kvjax.places import expanded
from kvjax.train.data.files import (
    PLACE,
    RECORD,
    Faulty,
    check_columns,
    records,
    unfilled,
)
from kvjax.train.recipe import Source

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

BUILDERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
FIELDS = {"json": ("field",), "text": ("sample_by",), "parquet": ()}
SAMPLED = ("document", "line", "paragraph")

LAYOUT = 1
"""Of the records that `datasets` keeps: raise it when the reading of files changes."""


def open_dataset(source: Source, split: str) -> "Dataset | IterableDataset":
    """The records of a source, with the columns that are read and no others.

    Those of files are kept as JSON with their place; `opened` makes records of them.

    A text file is one document, unless `fields` say otherwise (`sample_by`).

    Raises:
        ValueError: no such file, dataset, split or column; names the nearest column.
    """
    try:
        kind, files = _files(source)
    except (ValueError, OSError) as wrong:  # OSError: a name that no disk takes
        why = wrong.strerror if isinstance(wrong, OSError) else wrong
        raise ValueError(f"dataset {shown(source.dataset)}: {why}") from None
    try:
        if files:
            return _local(source, split, kind, files)
        return _hub(source, split)
    except Exception as wrong:  # readers and the hub raise whatever their layers raise
        raise ValueError(
            f"dataset {shown(source.dataset)}, split {split!r}: {said(wrong)}"
            f"{_of_cache(wrong)}"
        ) from wrong


def opened(record: Mapping[str, Any], row: int | None) -> tuple[Mapping[str, Any], str]:
    """A record of `open_dataset` and its place; `row` is its number, from 0."""
    if RECORD in record:
        return json.loads(record[RECORD]), record[PLACE]
    place = record.get(PLACE, "" if row is None else f"row {row + 1}")
    return {name: unfilled(value) for name, value in record.items()}, place


def said(wrong: BaseException) -> str:
    """What went wrong at first, without the words that libraries pack it into."""
    while wrong.__cause__ is not None and not isinstance(wrong, Faulty):
        wrong = wrong.__cause__
    kind = "" if isinstance(wrong, ValueError) else f"{type(wrong).__name__}: "
    return f"{kind}{str(wrong)[:1000]}"


def _of_cache(wrong: BaseException | None) -> str:
    """What to do where it is not the data but the library's cache that is wrong."""
    from datasets import config

    cache = str(config.HF_DATASETS_CACHE)
    while wrong is not None:
        name = str(getattr(wrong, "filename", None) or "")
        inside = name.startswith(cache) or (name and cache.startswith(name))
        if is_full(wrong) or (isinstance(wrong, OSError) and inside):
            return (
                f". What is read of data sets is kept in {cache}: set "
                "HF_DATASETS_CACHE to a folder that can be written and has room."
            )
        wrong = wrong.__cause__ or wrong.__context__
    return ""


def _hub(source: Source, split: str) -> "Dataset | IterableDataset":
    import datasets

    options: dict[str, Any] = {"split": split, "streaming": source.streaming}
    if source.encoding:
        options["encoding"] = source.encoding
    found = datasets.load_dataset(source.dataset, **{**options, **source.fields})
    known = found.column_names
    if known is None:  # a stream may not say before it is read
        known = list(next(iter(found), {}))
    for column in source.columns:
        if column not in known:
            raise ValueError(
                f"no column {column!r}; it has {sorted(known)}.{nearest(column, known)}"
            )
    found = found.select_columns(list(source.columns))
    # A stream is mixed before its records are counted.
    return found.map(_numbered, with_indices=True) if source.streaming else found


def _numbered(record: dict[str, Any], row: int) -> dict[str, Any]:
    return {**record, PLACE: f"row {row + 1}"}


def _local(
    source: Source, split: str, kind: str, splits: dict[str, list[str]]
) -> "Dataset | IterableDataset":
    import datasets

    options = {
        "kind": kind,
        "columns": source.columns,
        "encoding": source.encoding,
        "field": source.fields.get("field", ""),
        "sample_by": source.fields.get("sample_by", "document"),
        "layout": LAYOUT,
    }
    kept = datasets.Features({name: datasets.Value("large_string") for name in KEPT})

    def made(maker: Any, name: str) -> Any:
        files = [_stamped(file) for file in splits[name]]
        if source.streaming:
            check_columns(files, options)
        elif next(records(files, options), None) is None:  # the library takes none
            return maker.from_dict({name: [] for name in KEPT}, features=kept)
        given = {"files": files, "options": options}
        return maker.from_generator(records, features=kept, gen_kwargs=given)

    asked = re.findall(r"(?:^|\+)\s*([^\[+\s]+)", split) or [split]
    for name in asked:
        if name not in splits:
            raise ValueError(f"no split {name!r}; there is {sorted(splits)}.")
    if source.streaming:
        if split not in splits:
            raise ValueError(
                "a stream has no slices. Name splits by their files, `fields: "
                "{data_files: {train: ..., held: ...}}`, or leave `streaming` out."
            )
        return made(datasets.IterableDataset, split)
    sets = {name: made(datasets.Dataset, name) for name in asked}
    counts = {name: len(one) for name, one in sets.items()}
    parts = [
        sets[part.splitname].select(range(part.from_ or 0, _end(part.to, counts, part)))
        for part in datasets.ReadInstruction.from_spec(split).to_absolute(counts)
    ]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


KEPT = (PLACE, RECORD)


def _end(to: int | None, counts: Mapping[str, int], part: Any) -> int:
    return counts[part.splitname] if to is None else to


def _stamped(file: str) -> tuple[str, int, int, int, int]:
    """A file and what changes with it, so that nothing old is read from a cache.

    Programs that unpack and copy set the time of the last change, but not the others.
    """
    found = os.stat(file)
    times = found.st_mtime_ns, found.st_ctime_ns
    return file, found.st_size, *times, found.st_ino


def _files(source: Source) -> tuple[str, dict[str, list[str]]]:
    """Kind and files of a local dataset, by split; none for a hub id."""
    name, splits = source.dataset, data_files(source.fields)
    path = expanded(name)
    if os.path.isdir(path):
        if (path / "state.json").exists() and (path / "dataset_info.json").exists():
            raise ValueError(
                "the folder is what `Dataset.save_to_disk` writes. Write it as a file: "
                "`datasets.load_from_disk(folder).to_parquet('data.parquet')`."
            )
        found = [p for p in sorted(path.rglob("*")) if reader_of(p)]
    elif glob.has_magic(name):
        found = _matching(str(path))
    elif reader_of(path) or os.path.lexists(path):
        found = [path]
    else:
        return "", {}
    parts = {split: _named(files) for split, files in splits.items()}
    parts = parts if "data_files" in source.fields else {"train": found}
    kind = _checked(parts)
    _check_fields(source.fields, kind)
    return kind, {split: [str(p) for p in files] for split, files in parts.items()}


def data_files(fields: Mapping[str, Any]) -> dict[str, list[str]]:
    """`data_files` of a source, by split; empty where there are none.

    Raises:
        ValueError: it is neither a name, nor names, nor those by split.
    """
    if "data_files" not in fields:
        return {}
    given = fields["data_files"]
    by_split = given if isinstance(given, Mapping) else {"train": given}
    made = {}
    for split, names in by_split.items():
        found = [names] if isinstance(names, str) else names
        texts = isinstance(found, list | tuple) and [isinstance(f, str) for f in found]
        if not isinstance(split, str) or not texts or not all(texts):
            raise ValueError(
                "`data_files` must be a file or a pattern, a list of them, or a "
                f"mapping from splits to those; got {shown(given)}."
            )
        made[split] = [*found]
    return made


def reader_of(path: pathlib.Path) -> str | None:
    """What reads a file, by its name."""
    packed = path.suffix.lower() == ".gz"
    suffix = pathlib.Path(path.stem).suffix if packed else path.suffix
    kind = BUILDERS.get(suffix.lower())
    return None if packed and kind == "parquet" else kind


def _matching(pattern: str) -> list[pathlib.Path]:
    return [pathlib.Path(p) for p in sorted(glob.glob(pattern, recursive=True))]


def _named(files: Sequence[str]) -> list[pathlib.Path]:
    """Files and patterns of `data_files`."""
    found: list[pathlib.Path] = []
    for one in files:
        matching = _matching(one) if glob.has_magic(one) else [pathlib.Path(one)]
        if not matching:
            raise ValueError(
                f"no such file: nothing matches {shown(one)} in `data_files`."
            )
        found += matching
    return found


def _checked(splits: Mapping[str, Sequence[pathlib.Path]]) -> str:
    """The one kind of files that there are."""
    found = [path for files in splits.values() for path in files]
    missing = [str(path) for path in found if not os.path.isfile(path)]
    if not found or missing:
        which = f" ({', '.join(map(shown, missing[:3]))})" if missing else ""
        raise ValueError(
            f"no such file{which}. Expected a hub id, or files that end in "
            f"{', '.join(BUILDERS)}."
        )
    kinds = {reader_of(path) for path in found}
    if None in kinds or len(kinds) > 1:
        suffixes = sorted({"".join(path.suffixes[-2:]) for path in found})
        raise ValueError(
            f"it has files that end in {suffixes}; expected one kind of "
            f"{list(BUILDERS)}."
        )
    return str(kinds.pop())


def _check_fields(fields: Mapping[str, Any], kind: str) -> None:
    known = ("data_files", *FIELDS[kind])
    for name in fields:
        if name not in known:
            raise ValueError(
                f"`fields` has {name!r}; of {kind} files it may have {[*known]}."
                f"{nearest(name, known)}"
            )
    by = fields.get("sample_by", SAMPLED[0])
    if by not in SAMPLED:
        raise ValueError(f"`sample_by` must be one of {[*SAMPLED]}; got {shown(by)}.")
    key = fields.get("field", "")
    if not isinstance(key, str):
        raise ValueError(f"`field` must be a key of the JSON file; got {shown(key)}.")
