"""Rows from datasets in a seeded order that any step can be reached in.

A reader hands out rows one after the other. `skip` goes on as `take` does without the
row, so that a resumed run stands where the uninterrupted one stood.
"""

import abc
import collections
import functools
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvjax.train.data.records import Example, Prepare, as_row, preparation
from kvjax.train.data.rows import TokenRow
from kvjax.train.data.sources import open_dataset
from kvjax.train.data.words import Words
from kvjax.train.recipe import Source

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

LAYOUT = 1
"""Of the examples that `Dataset.map` keeps on disk: raise it when their making changes.

What is kept goes by the arguments of the call, not by the code that is called.
"""

LOG = logging.getLogger("kvjax.train")


class RowReader(abc.ABC):
    """An endless sequence of rows of one dataset, in an order of its own each pass.

    Plain text is packed: documents follow one another, `<bos>` and `<eos>` between
    them, and rows are cut out of that stream, so that a long document goes on in the
    next row and none is lost. Positions run through the row and attention crosses
    documents. Chats and questions have a row each; one that is longer than its row
    is left out, never cut.

    Attributes:
        name: of the dataset and its split, for messages.
        skipped: records that were left out, by reason, as far as they were read.
    """

    name: str
    skipped: collections.Counter[str]

    @abc.abstractmethod
    def take(self, width: int) -> TokenRow:
        """The next row, at most `width` tokens.

        Raises:
            ValueError: no record of the whole dataset fits.
        """

    @abc.abstractmethod
    def skip(self, width: int) -> None:
        """Go on as `take(width)` does."""

    @abc.abstractmethod
    def reset(self) -> None:
        """Back to the first row."""


def open_reader(
    source: Source, split: str, words: Words, seed: int, widths: Sequence[int]
) -> RowReader:
    """A reader of one split of a source.

    `seed` is of the order, `widths` are those of the rows that will be asked for.

    Raises:
        ValueError: the dataset cannot be read, a column is missing, or no record can
            be used; names the source.
    """
    records = open_dataset(source, split)
    prepare = preparation(source, words)
    name = f"dataset {source.dataset!r}, split {split!r}"
    if source.streaming:
        mixed = records.shuffle(seed=seed, buffer_size=source.buffer)  # type: ignore
        return StreamedReader(name, mixed, prepare, bool(source.text))  # type: ignore
    return StoredReader(name, records, prepare, bool(source.text), seed, widths)  # type: ignore


class StoredReader(RowReader):
    """Rows of a dataset that is on disk: any row is found without those before it.

    All records are tokenized once, by `Dataset.map`, which keeps the result on disk.
    """

    def __init__(
        self,
        name: str,
        records: "Dataset",
        prepare: Prepare,
        packed: bool,
        seed: int,
        widths: Sequence[int],
    ):
        self.name, self.packed, self.seed = name, packed, seed
        self.examples, faults, self.lengths = _prepared(records, prepare)
        self.skipped = collections.Counter(fault for fault in faults if fault)
        usable = np.array([not fault for fault in faults], bool)
        if not packed:
            fit = self.lengths <= max(widths)
            self.skipped[_longer(max(widths))] = int(np.sum(usable & ~fit))
            usable &= fit
        self.skipped = +self.skipped  # without what there is none of
        self.ids = np.flatnonzero(usable)
        self._check(len(records), min(widths))
        self.total = int(self.lengths[self.ids].sum())
        self.at = 0  # tokens of packed text, else records
        self._pass = functools.lru_cache(2)(self._order)

    def _check(self, count: int, narrowest: int) -> None:
        if not len(self.ids):
            raise _unusable(self.name, self.skipped, count)
        if self.skipped:
            LOG.warning("%s: %s", self.name, _report(self.skipped, count))
        if self.packed:
            return
        lengths = self.lengths[self.ids]
        if lengths.min() > narrowest:
            raise ValueError(
                f"{self.name}: the shortest record has {lengths.min()} tokens, rows "
                f"are {narrowest} wide in some steps. Widen `lengths` of the stages."
            )
        if wide := int(np.sum(lengths > narrowest)):
            LOG.warning(
                "%s: %d of %d records are longer than %d tokens and are passed over "
                "in the steps with rows that narrow",
                *(self.name, wide, count, narrowest),
            )

    def _order(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Records of one pass in their order, and the tokens up to each one's end."""
        order = np.random.default_rng([self.seed, number]).permutation(self.ids)
        return order, np.cumsum(self.lengths[order])

    def take(self, width: int) -> TokenRow:
        if self.packed:
            tokens = np.concatenate(list(self._stretch(width)))
            self.at += width
            return as_row(_whole(tokens))
        record = self._next(width)
        return as_row(self.examples[record])

    def skip(self, width: int) -> None:
        if self.packed:
            self.at += width
        else:
            self._next(width)

    def reset(self) -> None:
        self.at = 0

    def _next(self, width: int) -> int:
        while True:
            number, index = divmod(self.at, len(self.ids))
            record = int(self._pass(number)[0][index])
            self.at += 1
            if self.lengths[record] <= width:
                return record

    def _stretch(self, width: int) -> Iterator[np.ndarray]:
        """The next `width` tokens of the packed text, document by document."""
        at, end = self.at, self.at + width
        while at < end:
            number, offset = divmod(at, self.total)
            order, ends = self._pass(number)
            index = int(np.searchsorted(ends, offset, side="right"))
            record = int(order[index])
            first = offset - int(ends[index] - self.lengths[record])
            part = np.asarray(self.examples[record]["tokens"], np.int32)
            part = part[first : first + end - at]
            at += len(part)
            yield part


class StreamedReader(RowReader):
    """Rows of a dataset that is read as it goes; going on means reading up to there.

    The state of a shuffle buffer is its records, so a resumed run reads again what the
    first one had read.
    """

    def __init__(
        self, name: str, records: "IterableDataset", prepare: Prepare, packed: bool
    ):
        self.name, self.packed = name, packed
        self.records, self.prepare = records, prepare
        self.reset()

    def reset(self) -> None:
        self.skipped = collections.Counter()
        self.passes = 0
        self.left = np.zeros(0, np.int32)
        self.flow = self._examples()

    def _examples(self) -> Iterator[Example]:
        for self.passes in itertools.count():
            self.records.set_epoch(self.passes)
            count = useful = 0
            for record in self.records:
                count += 1
                example = self.prepare(record)
                if example["fault"]:
                    self._miss(example["fault"])
                else:
                    useful += 1
                    yield example
            if not useful:
                raise _unusable(self.name, self.skipped, count)

    def _miss(self, why: str) -> None:
        if self.passes:  # counted in the first pass
            return
        self.skipped[why] += 1
        if str(self.skipped.total()).strip("0") == "1":  # 1, 10, 100 ...
            LOG.warning("%s: %s", self.name, _report(self.skipped, None))

    def take(self, width: int) -> TokenRow:
        if self.packed:
            parts = [self.left]
            while sum(map(len, parts)) < width:
                parts.append(next(self.flow)["tokens"])
            tokens = np.concatenate(parts)
            self.left = tokens[width:]
            return as_row(_whole(tokens[:width]))
        began = self.passes
        for example in self.flow:
            if len(example["tokens"]) <= width:
                return as_row(example)
            self._miss(_longer(width))
            if self.passes > began + 1:
                break
        raise ValueError(
            f"{self.name}: no record fits a row of {width} tokens. Widen `lengths` of "
            "the stages."
        )

    def skip(self, width: int) -> None:
        self.take(width)


def _prepared(
    records: "Dataset", prepare: Prepare
) -> tuple["Dataset", list[str], np.ndarray]:
    """Examples, what is wrong with each, and its tokens."""
    import datasets

    features = datasets.Features(
        tokens=datasets.List(datasets.Value("int32")),
        answers=datasets.List(datasets.Value("bool")),
        context=datasets.Value("int32"),
        prompt=datasets.Value("int32"),
        fault=datasets.Value("string"),
        length=datasets.Value("int32"),
    )
    examples = records.map(
        functools.partial(_measured, prepare=prepare, layout=LAYOUT),
        remove_columns=records.column_names,
        features=features,
        desc="tokenizing",
    )
    faults = list(examples["fault"][:])
    examples = examples.with_format("numpy")
    return examples, faults, np.asarray(examples["length"][:], np.int64)


def _measured(record, prepare: Prepare, layout: int) -> dict:
    del layout
    example = prepare(record)
    return {**example, "length": len(example["tokens"])}


def _whole(tokens: np.ndarray) -> Example:
    answers = np.ones(len(tokens), bool)
    return Example(tokens=tokens, answers=answers, context=0, prompt=0, fault="")


def _longer(width: int) -> str:
    return f"longer than a row of {width} tokens"


def _report(skipped: collections.Counter[str], count: int | None) -> str:
    reasons = ", ".join(f"{n} {why}" for why, n in sorted(skipped.items()))
    of = "so far" if count is None else f"of {count}"
    return f"{skipped.total()} records {of} left out: {reasons}"


def _unusable(name: str, skipped: collections.Counter[str], count: int) -> ValueError:
    return ValueError(
        f"{name} has no record that can be used, of {count}"
        + (f": {_report(skipped, count)}." if skipped else ".")
    )
