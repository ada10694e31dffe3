"""Tasks whose items are in files: chosen by a seed, and what becomes of long ones."""

import abc
import dataclasses
import os
import pathlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, ClassVar

from kvjax.eval.tasks.base import (
    HELD_OUT,
    Episode,
    Measure,
    Task,
    stream,
)
from kvjax.eval.tasks.fitting import ENOUGH
from kvjax.fields import OneOf

DATA = "KVJAX_DATA"
"""Variable of the environment: the folder whose `eval/` holds files by default."""

Long = Annotated[str, OneOf("refuse", "leave_out", "cut")]
"""What becomes of items that are too long: an error, others in their place, or less of
them (text: without its middle; worked examples: fewer)."""


FEW = 64
"""Of so many parts that can be cut, exactly as many as fit are kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """An item that may be cut.

    Attributes:
        place: where it stands, for messages.
        size: of what can be cut out of it: characters, or worked examples.
        make: the episode with that much of it; with `size` it is whole.
    """

    place: str
    size: int
    make: Callable[[int], Episode]


def draft(place: str, episode: Episode) -> Draft:
    """An episode that is cut in the middle of its context, character by character."""

    def make(size: int) -> Episode:
        text = episode.context
        head, tail = text[: size - size // 2], text[len(text) - size // 2 :]
        return dataclasses.replace(episode, context=head + tail)

    return Draft(place=place, size=len(episode.context), make=make)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileTask(Task):
    """A task that reads its items.

    Items are as long as they are: `length` is what they may measure, and `long` says
    what becomes of those that measure more.

    `episodes` refuses more of them than there are.

    Attributes:
        long: `refuse` (an error before anything is computed), `leave_out` (others are
            taken), or `cut`.
        path: of the items.
    """

    unit: ClassVar[str] = "items"
    paths: ClassVar[tuple[str, ...]] = ("path",)

    long: Long = "refuse"
    path: str = ""

    def place(self) -> str:
        """Where items are read: a file, a folder or a hub id; empty: they are made.

        Raises:
            ValueError: nothing is given, and nothing is there by default.
        """
        return self.path

    def lacks(self) -> str:
        """Why there are no items."""
        try:
            self.place()
        except ValueError as wrong:
            return str(wrong)
        return ""

    def files(self) -> Mapping[str, pathlib.Path]:
        """See `Task.files`; with what is read by default."""
        if self.lacks():
            return {}
        return super(FileTask, dataclasses.replace(self, path=self.place())).files()

    @abc.abstractmethod
    def drafts(self, turns: int) -> Sequence[Draft]:
        """All items of the file, in its order, with up to `turns` questions each.

        Raises:
            ValueError: it cannot be read; names the file and the row.
        """

    def episode(self, rng: random.Random, size: int, turns: int = 1) -> Episode:
        """Nothing to train on: what is in the file is held out.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"Task {self.name!r} reads items that are held out, so nothing is trained "
            "on them. Give the recipe a file of training data as a dataset."
        )

    def _drawn(
        self, seed: int, count: int, length: int, measure: Measure, turns: int
    ) -> list[Episode]:
        """Items of the file in a seeded order, none twice.

        Raises:
            ValueError: the file has fewer; some are longer than `length`, and `long`
                does not say what to do, or even without what can be cut.
        """
        found = self.drafts(turns)
        if len(found) < count:
            raise ValueError(
                f"Task {self.name!r} has {len(found)} items; {count} are asked for. "
                "Ask for fewer (`items`), or give it more data."
            )
        order = stream(HELD_OUT, self.name, seed, 0).sample(
            range(len(found)), len(found)
        )
        drawn = [found[index] for index in order]
        if self.long == "leave_out":
            return self._short(drawn, count, length, measure)
        return self._all(drawn[:count], length, measure)

    def _short(
        self, drawn: Sequence[Draft], count: int, length: int, measure: Measure
    ) -> list[Episode]:
        made: list[Episode] = []
        for one in drawn:
            if len(made) == count:
                break
            episode = one.make(one.size)
            if measure(episode) <= length:
                made.append(episode)
        if len(made) < count:
            raise ValueError(
                f"Task {self.name!r}: {len(made)} of {len(drawn)} items fit into a "
                f"length of {length}; {count} are asked for. Raise the length, ask for "
                "fewer (`items`), or set `long: cut`."
            )
        return made

    def _all(
        self, drawn: Sequence[Draft], length: int, measure: Measure
    ) -> list[Episode]:
        whole = [one.make(one.size) for one in drawn]
        needs = [measure(episode) for episode in whole]
        over = [need for need in needs if need > length]
        if over and self.long == "refuse":
            raise ValueError(
                f"Task {self.name!r}: {len(over)} of {len(drawn)} items do not fit "
                f"into a length of {length}; the longest needs {max(over)}. Raise the "
                "length, or set `long` to 'leave_out' or 'cut'."
            )
        return [
            episode if need <= length else self._cut(one, length, measure)
            for one, episode, need in zip(drawn, whole, needs, strict=True)
        ]

    def _cut(self, one: Draft, length: int, measure: Measure) -> Episode:
        """The item with as much of it as fits, or nearly."""
        best = one.make(0)
        low, short = 0, measure(best)
        if short > length:
            raise ValueError(
                f"Task {self.name!r}, {one.place}: this item does not fit into a "
                f"length of {length}: it needs {short} without all that can be cut. "
                "Raise the length, or set `long: leave_out`."
            )
        high, long, halve = one.size, measure(one.make(one.size)), False
        while high - low > 1 and (high < FEW or short < ENOUGH * length):
            share = 0.5 if halve else (length - short) / (long - short)
            size = min(max(low + int(share * (high - low)), low + 1), high - 1)
            made = one.make(size)
            if (need := measure(made)) <= length:
                best, low, short = made, size, need
            else:
                high, long = size, need
            halve = not halve
        turns = tuple(
            dataclasses.replace(turn, meta={**turn.meta, "cut": one.size - low})
            for turn in best.turns
        )
        return dataclasses.replace(best, turns=turns)


def given_file(task: str, field: str, path: str, *default: str) -> str:
    """The file that a task was given, or the one in the folder of `KVJAX_DATA`.

    Args:
        task: its name, for messages.
        field: the path's.
        path: what was given; empty: the default.
        default: below `eval/` of that folder.

    Raises:
        ValueError: no file is given, and there is none by default.
    """
    if path:
        return path
    folder = os.environ.get(DATA, "")
    where = pathlib.Path("eval", *default)
    if folder and os.path.isfile(pathlib.Path(folder) / where):
        return str(pathlib.Path(folder) / where)
    why = f"{folder}/{where} is not there" if folder else f"{DATA} is not set"
    raise ValueError(
        f"Task {task!r} needs `{field}`: a file, or a hub id. Without one it reads "
        f"${DATA}/{where}, and {why}."
    )
