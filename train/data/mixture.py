"""Training data: a weighted mixture of tasks and datasets, made as it is needed.

Batch `i` is a pure function of the recipe and `i`, so a resumed run sees the same data.
"""

import dataclasses
import pathlib
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from kvjax.eval.tasks import TRAIN, RecordTask, Task, make_task, stream
from kvjax.fields import Count, fit
from kvjax.train.data.batch import TokenBatch, pack
from kvjax.train.data.readers import RowReader, open_reader
from kvjax.train.data.records import answer_end
from kvjax.train.data.rows import TokenRow
from kvjax.train.data.share import WHOLE, RowShare
from kvjax.train.data.tasks import TaskRows
from kvjax.train.data.words import CHARACTERS, Words
from kvjax.train.recipe import DataConfig, Source, Stage

TRIES = 48
"""Episodes that are drawn to see whether a task fits into a row."""


class Mixture:
    """Batches of a weighted mixture of tasks and datasets.

    Args:
        config: sources and their weights.
        stages: how many rows of which width, when.
        seed: of the training stream; held-out items never share it.
        visible: share of rows that are compressed behind their (last) question; the
            others before it. See `TokenRow.point` for plain text.
        words: of the model; characters unless it has a tokenizer of its own.
        share: the rows of each batch that are made here.

    Raises:
        ValueError: a source that cannot be read, or has nothing to train on.
    """

    def __init__(
        self,
        config: DataConfig,
        stages: Sequence[Stage],
        seed: int,
        visible: float = 0.0,
        words: Words = CHARACTERS,
        share: RowShare = WHOLE,
    ):
        self.config = config
        self.share = share
        self.visible = visible
        self.stages = tuple(stages)
        self.seed = seed
        self.words = words
        self._tasks: dict[Task, TaskRows] = {}
        self.widths = sorted({width for stage in stages for width in stage.lengths})
        self.readers: list[tuple[Source, RowReader]] = []
        self.mixtures = [
            self._weights(stage.sources or config.sources) for stage in self.stages
        ]
        self.held_out = self._held_out()
        self._at = 0  # the step before which the readers stand
        self._check_widths()

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that the answers of chats and questions are trained to end with."""
        found = (answer_end(source, self.words) for source, _ in self.readers)
        return tuple(dict.fromkeys(token for token in found if token is not None))

    def batch(self, step: int, share: RowShare | None = None) -> TokenBatch:
        """The batch of one step; its rows have one width.

        Args:
            step: from 0.
            share: its rows that are made; None: those of this process.

        Raises:
            ValueError: no record of a streamed dataset fits the step's rows.
        """
        share = self.share if share is None else share
        step = fit(step, Count, "step")
        self._seek(step)
        rng = stream(TRAIN, "mixture", self.seed, step)
        width, chosen = self._plan(rng, step)
        mine = share.rows(self._stage(step)[0].rows(width))
        made = [
            self._take(one, rng, width, number in mine)
            for number, one in enumerate(chosen)
        ]
        self._at = step + 1
        # A stream of its own: rows do not depend on where they are compressed.
        coin = stream(TRAIN, "visibility", self.seed, step)
        draws = [coin.random() for _ in made]
        rows = [one for one in made if one is not None]
        points = [rows[i].point(draws[n], self.visible) for i, n in enumerate(mine)]
        batch = pack(rows, width, points, step, self.words.pad)
        if share == WHOLE:
            return batch
        # Static, so it must be the same everywhere: what no row can exceed.
        return dataclasses.replace(batch, later=width)

    def _take(
        self, source: Task | RowReader, rng: random.Random, width: int, mine: bool
    ) -> TokenRow | None:
        """The next row of a source; None where another process makes it."""
        if not isinstance(source, RowReader):
            made = self._row(source, rng, width)  # the rows behind it go on in `rng`
            return made if mine else None
        if mine:
            return source.take(width)
        return source.skip(width)

    def batches(self, first: int, last: int) -> Iterator[TokenBatch]:
        """Batches `first .. last - 1`, the next one prepared in the background."""
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self.batch, first)
            for step in range(first, last):
                batch = ahead.result()
                if step + 1 < last:
                    ahead = pool.submit(self.batch, step + 1)
                yield batch

    def _seek(self, step: int) -> None:
        """Bring the readers to where the steps before `step` leave them."""
        if not self.readers:
            return
        if step < self._at:
            for _, reader in self.readers:
                reader.reset()
            self._at = 0
        for past in range(self._at, step):
            rng = stream(TRAIN, "mixture", self.seed, past)
            width, chosen = self._plan(rng, past)
            for one in chosen:
                if isinstance(one, RowReader):
                    one.skip(width)
        self._at = step

    def _plan(
        self, rng: random.Random, step: int
    ) -> tuple[int, Iterator[Task | RowReader]]:
        """Width of the step's rows and where each one comes from."""
        stage, weights = self._stage(step)
        width = draw(rng, stage.lengths)
        # Where readers have to follow, sources are drawn apart from what tasks draw;
        # where there are none, the committed models were trained with one stream.
        if self.readers:
            rng = stream(TRAIN, "sources", self.seed, step)
        # Drawn as rows are made: in one stream, what a task draws comes in between.
        return width, (draw(rng, weights) for _ in range(stage.rows(width)))

    def _row(self, task: Task, rng: random.Random, width: int) -> TokenRow:
        turns = rng.randint(1, self._most_turns(task, width))
        return self.rows_of(task).fitting(rng, width, turns)

    def _most_turns(self, task: Task, width: int) -> int:
        # Wide rows ask many questions: answers are what teaches.
        most = self.config.turns * width // 128
        return max(1, most) if task.multi_turn else 1

    def _check_widths(self) -> None:
        """Tasks fit into the narrowest rows of each stage, whatever they draw.

        So do those that are held out.

        Raises:
            ValueError: one does not; names the stage and the width.
        """
        kept = self.config.held_out_tasks
        held = [make_task(name, **fields) for name, fields in kept.items()]
        for number, weights in enumerate(self.mixtures):
            width = min(self.stages[number].lengths)
            tasks = [one for one in weights if isinstance(one, Task)]
            try:
                for task in dict.fromkeys([*tasks, *held]):
                    self._check_width(task, width)
            except ValueError as wrong:
                raise ValueError(
                    f"`stages.{number}.lengths` has rows of {width} tokens: {wrong}"
                ) from None

    def _check_width(self, task: Task, width: int) -> None:
        most = self._most_turns(task, width)
        for number in range(TRIES):
            rng = stream(TRAIN, "fits", self.seed, number)
            self.rows_of(task).fitting(rng, width, 1 + number % most)

    def rows_of(self, task: Task) -> TaskRows:
        """The task as rows, with the tokens and weights of this mixture."""
        if task not in self._tasks:
            weight = self.config.context_weight
            self._tasks[task] = TaskRows(task, self.words, weight)
        return self._tasks[task]

    def _stage(self, step: int) -> tuple[Stage, dict[Task | RowReader, float]]:
        for stage, weights in zip(self.stages, self.mixtures, strict=True):
            if step < stage.steps:
                return stage, weights
            step -= stage.steps
        return self.stages[-1], self.mixtures[-1]

    def _weights(self, sources: Sequence[Source]) -> dict[Task | RowReader, float]:
        """Each task or reader and its weight; what is named twice weighs both."""
        weights: dict[Task | RowReader, float] = {}
        for source in sources:
            if source.task:
                one = make_task(source.task, **source.fields)
                if isinstance(one, RecordTask):
                    self.words.density(one)
            else:
                one = self._reader(source)
            weights[one] = weights.get(one, 0.0) + source.weight
        return weights

    def _reader(self, source: Source) -> RowReader:
        """The source's reader: stages that name the same data go on in it."""
        data = dataclasses.replace(source, weight=1.0, held_out="")
        for known, reader in self.readers:
            if known == data:
                return reader
        reader = self._open(source, source.split)
        self.readers.append((data, reader))
        return reader

    def _held_out(self) -> dict[str, RowReader]:
        """A reader for each held-out split, by name."""
        sources = list(self.config.sources)
        sources += [one for stage in self.stages for one in stage.sources]
        held = [dataclasses.replace(one, weight=1.0) for one in sources if one.held_out]
        held = [one for n, one in enumerate(held) if one not in held[:n]]
        names = [f"{pathlib.Path(one.dataset).name}:{one.held_out}" for one in held]
        if len(set(names)) < len(names):
            names = [f"{one.dataset}:{one.held_out}" for one in held]
        if len(set(names)) < len(names):
            names = [f"{name} ({n})" for n, name in enumerate(names, 1)]
        return {
            name: self._open(one, one.held_out)
            for name, one in zip(names, held, strict=True)
        }

    def _open(self, source: Source, split: str) -> RowReader:
        seed = stream(TRAIN, "order", self.seed, len(self.readers)).getrandbits(32)
        return open_reader(source, split, self.words, seed, self.widths)


def draw[K](rng: random.Random, weights: dict[K, float]) -> K:
    """A key, with probability proportional to its weight."""
    return rng.choices(list(weights), weights=list(weights.values()))[0]
