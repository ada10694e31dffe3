"""What a task is: seeded items with known answers, and a score for a reply."""

import abc
import dataclasses
import os
import pathlib
import random
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from kvjax.eval.tasks.fitting import fitted
from kvjax.fields import Checked, Count, Positive, Seed, fit
from kvjax.places import expanded

HELD_OUT = "held-out"
TRAIN = "train"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """One question, and what is right about it.

    Attributes:
        question: what follows the context, or the turn before.
        answer: a perfect reply, which training teaches and which is put between the
            turns of a session; with the stop of the task, where it has one.
        meta: what the score needs, and what a reader may want to know.
        prefix: begins the reply: the model goes on behind it.
        answers: what replies are compared with, where that is not `answer`.
        choices: replies to choose from by their likelihood, one of which is `answer`;
            none: a reply is written.
        max_new_tokens: of the reply; None: as the task has it.
    """

    question: str
    answer: str
    meta: Mapping[str, Any]
    prefix: str = ""
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    max_new_tokens: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item(Turn):
    """One question about one context.

    The prompt is `context + question`. Compress after `context` for a query-agnostic
    cache, after the prompt for a query-aware one.
    """

    context: str

    @property
    def prompt(self) -> str:
        """Everything the model reads before it answers."""
        return self.context + self.question

    @property
    def alone(self) -> "Episode":
        """The item as an episode of one turn."""
        return Episode(context=self.context, turns=(self,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episode:
    """One context and the questions asked of it in turn."""

    context: str
    turns: tuple[Turn, ...]

    def item(self, turn: int = 0) -> Item:
        """One of its questions with the context."""
        one = self.turns[turn]
        fields = {f.name: getattr(one, f.name) for f in dataclasses.fields(one)}
        return Item(context=self.context, **fields)


Measure = Callable[[Episode], int]
"""How long an episode is with its replies, in tokens or in characters."""


def characters(episode: Episode) -> int:
    """Characters of an episode and its replies."""
    turns = (len(t.question + t.prefix + t.answer) for t in episode.turns)
    return len(episode.context) + sum(turns)


def stream(kind: str, task: str, seed: int, index: int) -> random.Random:
    """Random numbers of one item; streams of different `kind` share no seed."""
    return random.Random(f"{kind}/{task}/{seed}/{index}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(Checked, abc.ABC):
    """A generator of items and their score; fields are hyper-parameters only.

    Attributes:
        name: as it is registered.
        unit: what `size` counts.
        multi_turn: whether several questions can be asked of one context.
        chat: whether a model with a chat template is asked by it.
        stop: text that ends a reply, beside the end that the model writes itself.
        system: what a chat begins with.
        paths: fields that name files or folders.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    multi_turn: ClassVar[bool] = True
    chat: ClassVar[bool] = True
    stop: ClassVar[str] = ""
    system: ClassVar[str] = ""
    paths: ClassVar[tuple[str, ...]] = ()

    @property
    @abc.abstractmethod
    def max_new_tokens(self) -> int:
        """Tokens of the longest reply, stop included."""

    @abc.abstractmethod
    def episode(self, rng: random.Random, size: int, turns: int = 1) -> Episode:
        """One context with up to `turns` questions.

        Args:
            rng: where everything random comes from.
            size: how large the context is, in the task's `unit`.
            turns: how many questions.

        Raises:
            ValueError: the size is too small for the questions.
        """

    @abc.abstractmethod
    def score(self, item: Turn, reply: str) -> float:
        """How right `reply` is, in [0, 1]; `item` is a turn or an item.

        The reply is what is written behind `item.prefix`, without the prefix.
        """

    def cut(self, reply: str) -> str:
        """A reply up to its first stop, which is part of it."""
        return "".join(reply.partition(self.stop)[:2]) if self.stop else reply

    def parts(self) -> Mapping[str, "Task"]:
        """Tasks that are scored apart, by name; of most it is one, without a name."""
        return {"": self}

    def lacks(self) -> str:
        """Why it cannot be asked as it is, such as a file that has to be given."""
        return ""

    def files(self) -> Mapping[str, pathlib.Path]:
        """Files that episodes are made of, by what the fields say."""
        found: dict[str, pathlib.Path] = {}
        for name in self.paths:
            given = getattr(self, name)
            path = expanded(given) if given else None
            # `Path.is_dir` raises for names that are too long.
            if path is not None and os.path.isdir(path):
                files = (one for one in sorted(path.iterdir()) if one.is_file())
                found |= {f"{given}/{one.name}": one for one in files}
            elif path is not None and os.path.isfile(path):
                found[given] = path
        return found

    def smallest(self, length: int) -> int:
        """A size that an episode of this length has at least."""
        del length
        return 1

    def generate(
        self, seed: int, count: int, length: int, measure: Measure | None = None
    ) -> list[Item]:
        """`count` held-out items of one question each; see `episodes`."""
        return [
            dataclasses.replace(
                one.item(),
                meta={"task": self.name, "index": index, **one.turns[0].meta},
            )
            for index, one in enumerate(self.episodes(seed, count, length, measure))
        ]

    def episodes(
        self,
        seed: int,
        count: int,
        length: int,
        measure: Measure | None = None,
        turns: int = 1,
    ) -> list[Episode]:
        """Held-out contexts with their questions, each as long as `length` allows.

        Deterministic in every argument; episode `i` does not depend on `count`. The
        stream is disjoint from the one training draws from.

        Args:
            seed: of all of them.
            count: how many.
            length: what an episode with its replies may measure.
            measure: how; None: in characters.
            turns: questions of each, at most.

        Raises:
            ValueError: the smallest episode is longer than that; of tasks that read
                files, see there.
        """
        seed = fit(seed, Seed, "seed")
        count, length = fit(count, Count, "count"), fit(length, Positive, "length")
        turns = fit(turns, Positive, "turns")
        return self._drawn(seed, count, length, measure or characters, turns)

    def _drawn(
        self, seed: int, count: int, length: int, measure: Measure, turns: int
    ) -> list[Episode]:
        """`episodes`, whose arguments are right: here they are made."""
        return [
            self.fitted(
                lambda i=i: stream(HELD_OUT, self.name, seed, i), length, measure, turns
            )
            for i in range(count)
        ]

    def fitted(
        self,
        draw: Callable[[], random.Random],
        length: int,
        measure: Measure | None = None,
        turns: int = 1,
    ) -> Episode:
        """The largest episode of these random numbers that `length` allows.

        Args:
            draw: its random numbers from their beginning.
            length: see `episodes`, as are the others.
            measure: how episodes are measured.
            turns: questions, at most.
        """
        return fitted(
            lambda size: self.episode(draw(), size, turns),
            measure or characters,
            smallest=self.smallest(length),
            most=length,
            what=f"task {self.name!r}",
        )
