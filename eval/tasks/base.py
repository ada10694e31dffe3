"""What a task is: seeded, human-readable items, and a score for a reply.

Every record of every task is written in brackets (`[KQ=ab3d]`), so one stop character
serves all of them, and records can be found by eye and by delimiter-based methods.
"""

import abc
import dataclasses
import random
from collections.abc import Mapping
from typing import Any, ClassVar

from kvjax.fields import Checked, Count, Positive, Seed, Share, fit

STOP = "]"
"""Last character of every answer; never part of a value."""

HELD_OUT = "held-out"
TRAIN = "train"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One question about one context.

    The prompt is `context + question`. Compress after `context` for a query-agnostic
    cache, after the prompt for a query-aware one. `answer` ends with the stop
    character and has at least two characters, so at least one of them is decoded
    from the compressed cache.
    """

    context: str
    question: str
    answer: str
    meta: Mapping[str, Any]

    @property
    def prompt(self) -> str:
        """Everything the model reads before it answers."""
        return self.context + self.question


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """One question and its answer."""

    question: str
    answer: str
    meta: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episode:
    """One context and the questions asked of it in turn."""

    context: str
    turns: tuple[Turn, ...]


def stream(kind: str, task: str, seed: int, index: int) -> random.Random:
    """Random numbers of one item; streams of different `kind` share no seed."""
    return random.Random(f"{kind}/{task}/{seed}/{index}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(Checked, abc.ABC):
    """A generator of items and their score; fields are hyper-parameters only.

    Attributes:
        redundancy: share of filler sentences taken from a handful of stock phrases,
            in [0, 1]; the rest is drawn word by word.
    """

    name: ClassVar[str]
    multi_turn: ClassVar[bool] = True

    redundancy: Share = 0.5

    @property
    def stop(self) -> str:
        """Character that ends a reply."""
        return STOP

    @property
    @abc.abstractmethod
    def max_new_tokens(self) -> int:
        """Longest answer in characters, stop included."""

    @abc.abstractmethod
    def episode(self, rng: random.Random, length: int, turns: int = 1) -> Episode:
        """One context with up to `turns` questions, at most `length` characters."""

    @abc.abstractmethod
    def score(self, item: Item, reply: str) -> float:
        """How right `reply` is, in [0, 1]; text after the stop does not count."""

    def generate(self, seed: int, count: int, length: int) -> list[Item]:
        """`count` held-out items of at most about `length` characters each.

        Deterministic in every argument; item `i` does not depend on `count`. The
        stream is disjoint from the one training draws from.
        """
        seed = fit(seed, Seed, "seed")
        count, length = fit(count, Count, "count"), fit(length, Positive, "length")
        items = []
        for index in range(count):
            rng = stream(HELD_OUT, self.name, seed, index)
            episode = self.episode(rng, length)
            turn = episode.turns[0]
            items.append(
                Item(
                    context=episode.context,
                    question=turn.question,
                    answer=turn.answer,
                    meta={"task": self.name, "index": index, **turn.meta},
                )
            )
        return items


def before_stop(reply: str) -> str:
    """The reply up to its first stop character."""
    return reply.split(STOP, 1)[0]


def through_stop(reply: str) -> str:
    """The reply up to its first stop character, which is part of it."""
    return "".join(reply.partition(STOP)[:2])


def too_short(task: str, length: int, need: int) -> ValueError:
    """The error of a length that cannot hold the smallest item."""
    return ValueError(
        f"Task {task!r} does not fit into {length} characters: it needs {need}. "
        "Raise the length, or ask it for less (`fields`)."
    )
