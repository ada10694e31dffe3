"""Synthetic tasks as data: how long an episode is, and datasets for any trainer."""

import functools
import random
from typing import TYPE_CHECKING, Any

import numpy as np

from kvjax.eval.tasks import (
    HELD_OUT,
    TRAIN,
    Episode,
    Item,
    RecordTask,
    Task,
    make_task,
    stream,
)
from kvjax.train.data.rows import TokenRow
from kvjax.train.data.words import Words

if TYPE_CHECKING:
    from datasets import Dataset


class TaskRows:
    """A task as rows of a model's tokens.

    Records are read as they are; tasks in words by the chat template of the model,
    where it has one, as evaluations ask them.

    Args:
        task: what rows are made of.
        words: of the model.
        context_weight: loss weight of what is no answer.
    """

    def __init__(self, task: Task, words: Words, context_weight: float = 0.0):
        self.task, self.words, self.context_weight = task, words, context_weight
        self.frame = words.frame(task)

    def row(self, episode: Episode) -> TokenRow:
        """`begin`, the context, then question and answer of each turn, an end.

        Answers weigh 1 each, and in words the end of an answer, too; the rest, mostly
        filler nobody can predict, `context_weight`.
        """
        frame = self.frame
        encode = functools.partial(self.words.encode, going_on=True)
        begin = self.words.begin if not frame.chat else ()
        end = (frame.ends[-1:] if frame.chat else self.words.end)[:1]
        pieces = [(np.asarray(begin, np.int32), False)]
        pieces.append((self.words.encode(frame.opening + episode.context), False))
        for number, turn in enumerate(episode.turns):
            between = frame.between if number else ""
            pieces.append((encode(between + turn.question), False))
            if number == 0:
                prompt = sum(len(piece) for piece, _ in pieces)
            behind = frame.closing + turn.prefix
            pieces += [(encode(behind), False)] if behind else []
            pieces.append((encode(turn.answer + frame.end), True))
        if not frame.end:
            pieces.append((np.asarray(end, np.int32), self.task.chat))
        flags = [np.full(len(piece), flag) for piece, flag in pieces]
        answers = np.concatenate(flags)
        return TokenRow(
            tokens=np.concatenate([piece for piece, _ in pieces]).astype(np.int32),
            weights=np.where(answers, 1.0, self.context_weight).astype(np.float32),
            answers=answers,
            context=sum(len(piece) for piece, _ in pieces[:2]),
            prompt=prompt,
        )

    def fitting(self, rng: random.Random, width: int, turns: int = 1) -> TokenRow:
        """A row of at most `width` tokens, of an episode as long as that allows.

        Args:
            rng: of the training.
            width: of the row.
            turns: questions, at most.

        Raises:
            ValueError: no episode fits.
        """
        if isinstance(self.task, RecordTask):
            length = self.characters(width)
            while True:
                one = self.row(self.task.episode(rng, length, turns=turns))
                if len(one.tokens) <= width:
                    return one
                length = length * 9 // 10  # more tokens than such text usually has
        state = rng.getstate()

        def draw() -> random.Random:
            rng.setstate(state)
            return rng

        while True:
            try:
                return self.row(self.task.fitted(draw, width, self._measure, turns))
            except ValueError:
                if turns == 1:
                    raise
                turns -= 1  # questions in words are long

    def held_out(self, count: int, width: int) -> list[Item]:
        """Items of one question, whose rows have at most `width` tokens."""
        if not isinstance(self.task, RecordTask):
            return self.task.generate(0, count, width, self._measure)
        length = self.characters(width)
        while True:
            items = self.task.generate(0, count, length)
            rows = (self.row(item.alone) for item in items)
            if max(len(one.tokens) for one in rows) <= width:
                return items
            length = length * 9 // 10

    def characters(self, width: int) -> int:
        """Characters of an episode of records whose row has about `width` tokens."""
        room = width - len(self.words.begin) - len(self.words.end)
        return int(self.words.density(self.task) * room)

    def _measure(self, episode: Episode) -> int:
        return len(self.row(episode).tokens)


def task_dataset(
    task: str,
    items: int,
    length: int,
    seed: int = 0,
    *,
    held_out: bool = False,
    **fields: Any,
) -> "Dataset":
    """A synthetic task as a `datasets.Dataset`, for any trainer.

    Args:
        task: its name.
        items: how many.
        length: characters of an item, at most about that many.
        seed: of the items.
        held_out: the items that `Task.generate` gives to evaluations, instead of ones
            that share no random stream with them.
        fields: of the task.

    Returns:
        Columns `context`, `question` and `answer`, text each.

    Raises:
        ValueError: unknown task or field, or a length that no item fits into.
    """
    import datasets

    maker = make_task(task, **fields)
    kind = HELD_OUT if held_out else f"{TRAIN}/dataset"
    table = []
    for index in range(items):
        episode = maker.episode(stream(kind, maker.name, seed, index), length)
        turn = episode.turns[0]
        table.append((episode.context, turn.question, turn.answer))
    names = ("context", "question", "answer")
    text = datasets.Features({name: datasets.Value("string") for name in names})
    return datasets.Dataset.from_list(
        [dict(zip(names, entry, strict=True)) for entry in table], features=text
    )
