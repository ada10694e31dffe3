"""Tasks that are generated, or read where a file of published items is given."""

import abc
import random
from collections.abc import Sequence

from kvjax.eval.tasks.base import Episode, Measure, Task, Turn
from kvjax.eval.tasks.from_files import Draft, FileTask


class GivenOrMade(FileTask):
    """A task whose items are made, or read from `path` where that is given."""

    @abc.abstractmethod
    def made(self, rng: random.Random, size: int, turns: int) -> Episode:
        """One context of this size with up to `turns` questions."""

    @abc.abstractmethod
    def drafts(self, turns: int) -> Sequence[Draft]:
        """See `FileTask.drafts`."""

    def episode(self, rng: random.Random, size: int, turns: int = 1) -> Episode:
        """See `Task.episode`.

        Raises:
            ValueError: a file is given, and what is in it is held out.
        """
        if self.path:
            return super().episode(rng, size, turns)
        return self.made(rng, size, turns)

    def _drawn(
        self, seed: int, count: int, length: int, measure: Measure, turns: int
    ) -> list[Episode]:
        if self.path:
            return super()._drawn(seed, count, length, measure, turns)
        return Task._drawn(self, seed, count, length, measure, turns)


def inside(
    place: str, before: str, text: str, after: str, turns: Sequence[Turn]
) -> Draft:
    """A draft of which only `text` is cut, in its middle, by characters."""

    def make(size: int) -> Episode:
        kept = text[: size - size // 2] + text[len(text) - size // 2 :]
        return Episode(context=before + kept + after, turns=tuple(turns))

    return Draft(place=place, size=len(text), make=make)


def placed[T](items: list[T], at: int, depth: float | None) -> list[T]:
    """`items` with that at `at` moved to a depth, a fraction; None: as they are."""
    if depth is None:
        return items
    rest = items[:at] + items[at + 1 :]
    rest.insert(round(depth * len(rest)), items[at])
    return rest
