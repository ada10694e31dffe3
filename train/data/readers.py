"""Rows from datasets in a seeded order that any step can be reached in.

A reader hands out rows one after the other. `skip` goes on as `take` does without the
row, so that a resumed run stands where the uninterrupted one stood.
"""

import abc
import collections
import functools
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvjax.messages import shown
from kvjax.train.data.example import Example, as_row, example
from kvjax.train.data.left_out import LeftOut, longer
from kvjax.train.data.prepared import Placing, kept, placed_example
from kvjax.train.data.records import preparation
from kvjax.train.data.rows import TokenRow
from kvjax.train.data.sources import open_dataset, said
from kvjax.train.data.words import Words
from kvjax.train.recipe import Source

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

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
        left_out: records that were left out, as far as they were read.
    """

    name: str
    left_out: LeftOut

    @property
    def skipped(self) -> collections.Counter[str]:
        """How many records were left out, by reason."""
        return self.left_out.counts

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
    name = f"dataset {shown(source.dataset)}, split {split!r}"
    prepare = functools.partial(
        placed_example, prepare=preparation(source, words), name=name
    )
    records = open_dataset(source, split)
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
        prepare: Placing,
        packed: bool,
        seed: int,
        widths: Sequence[int],
    ):
        self.name, self.packed, self.seed = name, packed, seed
        self.examples, faults, self.lengths = kept(records, prepare)
        self.left_out = LeftOut()
        for number in np.flatnonzero([bool(fault) for fault in faults]):
            self.left_out.add(faults[number], str(self.examples[int(number)]["why"]))
        usable = np.array([not fault for fault in faults], bool)
        if not packed:
            fit = self.lengths <= max(widths)
            self.left_out.add(longer(max(widths)), count=int(np.sum(usable & ~fit)))
            usable &= fit
        self.ids = np.flatnonzero(usable)
        self._check(len(records), min(widths))
        self.total = int(self.lengths[self.ids].sum())
        self.at = 0  # tokens of packed text, else records
        self._pass = functools.lru_cache(2)(self._order)

    def _check(self, count: int, narrowest: int) -> None:
        if not len(self.ids):
            raise self.left_out.nothing(self.name, count)
        if self.skipped:
            LOG.warning("%s: %s", self.name, self.left_out.report(count))
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
        self, name: str, records: "IterableDataset", prepare: Placing, packed: bool
    ):
        self.name, self.packed = name, packed
        self.records, self.prepare = records, prepare
        self.reset()

    def reset(self) -> None:
        self.left_out = LeftOut()
        self.passes = 0
        self.left = np.zeros(0, np.int32)
        self.flow = self._examples()

    def _examples(self) -> Iterator[Example]:
        for self.passes in itertools.count():
            self.records.set_epoch(self.passes)
            count = useful = 0
            for record in self._read():
                count += 1
                made = self.prepare(record, None)
                if made["fault"]:
                    self._miss(made["fault"], made["why"])
                else:
                    useful += 1
                    yield made
            if not useful:
                raise self.left_out.nothing(self.name, count)

    def _read(self) -> Iterator[Mapping[str, Any]]:
        try:
            yield from self.records
        # Readers and the hub raise whatever their layers raise.
        except Exception as wrong:
            raise ValueError(f"{self.name}: {said(wrong)}") from wrong

    def _miss(self, why: str, where: str = "") -> None:
        if self.passes:  # counted in the first pass
            return
        self.left_out.add(why, where)
        if str(self.skipped.total()).strip("0") == "1":  # 1, 10, 100 ...
            LOG.warning("%s: %s", self.name, self.left_out.report(None))

    def take(self, width: int) -> TokenRow:
        if self.packed:
            parts = [self.left]
            while sum(map(len, parts)) < width:
                parts.append(next(self.flow)["tokens"])
            tokens = np.concatenate(parts)
            self.left = tokens[width:]
            return as_row(_whole(tokens[:width]))
        began = self.passes
        for made in self.flow:
            if len(made["tokens"]) <= width:
                return as_row(made)
            self._miss(longer(width))
            if self.passes > began + 1:
                break
        raise ValueError(
            f"{self.name}: no record fits a row of {width} tokens. Widen `lengths` of "
            "the stages."
        )

    def skip(self, width: int) -> None:
        self.take(width)


def _whole(tokens: np.ndarray) -> Example:
    return example(tokens, np.ones(len(tokens), bool), 0, 0)
