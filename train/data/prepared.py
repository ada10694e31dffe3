"""Records as examples, each with its place; what is made of those on disk is kept."""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kvjax.train.data.example import Example
from kvjax.train.data.left_out import placed
from kvjax.train.data.records import Prepare
from kvjax.train.data.sources import opened, said

if TYPE_CHECKING:
    from datasets import Dataset

LAYOUT = 3
"""Of the examples that `Dataset.map` keeps on disk: raise it when their making changes.

What is kept goes by the arguments of the call, not by the code that is called.
"""

Placing = Callable[[Mapping[str, Any], int | None], Example]
"""What makes an example of a record and its number, which a stream does not know."""


def kept(
    records: "Dataset", prepare: Placing
) -> tuple["Dataset", list[str], np.ndarray]:
    """Examples, what is wrong with each, and its tokens."""
    import datasets

    if not len(records):  # no columns come of it
        return records, [], np.zeros(0, np.int64)
    features = datasets.Features(
        tokens=datasets.List(datasets.Value("int32")),
        answers=datasets.List(datasets.Value("bool")),
        context=datasets.Value("int32"),
        prompt=datasets.Value("int32"),
        fault=datasets.Value("string"),
        why=datasets.Value("string"),
        length=datasets.Value("int32"),
    )
    examples = records.map(
        functools.partial(_measured, prepare=prepare, layout=LAYOUT),
        with_indices=True,
        remove_columns=records.column_names,
        features=features,
        desc="tokenizing",
    )
    faults = list(examples["fault"][:])
    examples = examples.with_format("numpy")
    return examples, faults, np.asarray(examples["length"][:], np.int64)


def _measured(record, row: int, prepare: Placing, layout: int) -> dict:
    del layout
    made = prepare(record, row)
    return {**made, "length": len(made["tokens"])}


def placed_example(
    record: Mapping[str, Any], row: int | None, *, prepare: Prepare, name: str
) -> Example:
    """The example of a record; what is wrong with it is told with its place."""
    place = name
    try:
        values, place = opened(record, row)
        made = prepare(values)
    # Tokenizers raise whatever their layers raise.
    except Exception as wrong:
        raise ValueError(f"{name}, {place}: {said(wrong)}") from wrong
    return {**made, "why": placed(place, made["why"])} if made["fault"] else made
