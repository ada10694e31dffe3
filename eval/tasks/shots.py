"""Problems behind worked examples, both from files: the tasks of KVFundaBench.

The context holds the examples, which are what is compressed; the question is a problem.
"""

import abc
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from kvjax.eval.tasks.base import Episode, Turn
from kvjax.eval.tasks.from_files import Draft, FileTask, given_file
from kvjax.eval.tasks.reading_files import Record, read_records
from kvjax.fields import Positive, Range
from kvjax.messages import shown
from kvjax.places import expanded

Shots = Annotated[int, Range(0, 50)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A row: asked, or shown with its solution.

    Attributes:
        place: where it stands, for messages.
        question: as it is asked.
        prefix: what a reply begins with.
        answer: a perfect reply behind that.
        meta: what the score needs.
        group: only problems of the same group are examples of each other.
        choices: see `Turn.choices`.
    """

    place: str
    question: str
    prefix: str
    answer: str
    meta: Mapping[str, Any]
    group: str = ""
    choices: tuple[str, ...] = ()

    @property
    def worked(self) -> str:
        """Question and solution, as an example."""
        return self.question + self.prefix + self.answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShot(FileTask):
    """Problems of a file behind the first problems of another one, with solutions.

    A problem is never its own example. `cut` leaves out examples, the last ones first.

    Attributes:
        columns: of a row, which all have.
        further: those that some have.
        given: the file of problems below `KVJAX_DATA`.
        shots_split: of the examples.
        among: whether examples may be problems that are asked, where there is no split
            for them.
        path: of the problems: a file, a folder or a hub id; empty: below `KVJAX_DATA`.
        config: of a hub id or a folder.
        split: of a hub id or a folder.
        shots: worked examples.
        shots_path: where they are from; empty: the split of examples beside `path`.
        new_tokens: of a reply, at most.
    """

    unit: ClassVar[str] = "shots"
    paths: ClassVar[tuple[str, ...]] = ("path", "shots_path")
    columns: ClassVar[tuple[str, ...]]
    further: ClassVar[tuple[str, ...]] = ()
    given: ClassVar[tuple[str, ...]]
    shots_split: ClassVar[str]
    among: ClassVar[bool] = False

    path: str = ""
    config: str = ""
    split: str = "test"
    shots: Shots = 8
    shots_path: str = ""
    new_tokens: Positive = 256

    @property
    def max_new_tokens(self) -> int:
        """As the field says."""
        return self.new_tokens

    @abc.abstractmethod
    def problem(self, row: Record) -> Problem:
        """What a row asks.

        Raises:
            ValueError: a column holds something else; names file and row.
        """

    def header(self, group: str) -> str:
        """What the context begins with."""
        del group
        return ""

    def place(self) -> str:
        """See `FileTask.place`."""
        return given_file(self.name, "path", self.path, *self.given)

    def drafts(self, turns: int) -> Sequence[Draft]:
        """See `FileTask.drafts`; problems of the same examples are asked in turn."""
        path = self.place()
        asked = self._read(path, self.split, "path")
        known: dict[str, list[Problem]] = {}
        for one in self._examples(path, asked):
            known.setdefault(one.group, []).append(one)
        groups: dict[tuple[str, ...], tuple[list[Problem], list[Problem]]] = {}
        for one in asked:
            shots = self._shots_of(one, known.get(one.group, []))
            key = (one.group, *(shot.place for shot in shots))
            groups.setdefault(key, (shots, []))[1].append(one)
        return [
            self._draft(shots, problems[i : i + turns])
            for shots, problems in groups.values()
            for i in range(0, len(problems), turns)
        ]

    def _read(self, path: str, split: str, field: str) -> list[Problem]:
        rows = read_records(
            path,
            self.columns,
            optional=self.further,
            config=self.config,
            split=split,
            field=field,
        )
        return [self.problem(row) for row in rows]

    def _examples(self, path: str, asked: list[Problem]) -> list[Problem]:
        if not self.shots:
            return []
        if self.shots_path:
            return self._read(self.shots_path, self.shots_split, "shots_path")
        place = examples_of(path, self.split, self.shots_split)
        if place:
            return self._read(place, self.shots_split, "shots_path")
        if self.among:
            return asked
        raise no_examples(self.name, "shots_path", path, self.shots_split)

    def _shots_of(self, one: Problem, known: Sequence[Problem]) -> list[Problem]:
        found: list[Problem] = []
        for shot in known:
            if len(found) == self.shots:
                break
            if shot.question != one.question:
                found.append(shot)
        if len(found) < self.shots:
            which = f" of {shown(one.group)}" if one.group else ""
            raise ValueError(
                f"Task {self.name!r}: there are {len(found)} worked examples{which}; "
                f"`shots` asks for {self.shots}. Lower it, or give `shots_path`."
            )
        return found

    def _draft(self, shots: Sequence[Problem], problems: Sequence[Problem]) -> Draft:
        first = problems[0]

        def make(size: int) -> Episode:
            worked = [f"{shot.worked}\n\n" for shot in shots[:size]]
            return Episode(
                context=self.header(first.group) + "".join(worked),
                turns=tuple(self._turn(one, size) for one in problems),
            )

        return Draft(place=first.place, size=len(shots), make=make)

    def _turn(self, one: Problem, shots: int) -> Turn:
        return Turn(
            question=one.question,
            answer=one.answer,
            meta={**one.meta, "shots": shots},
            prefix=one.prefix,
            choices=one.choices,
            max_new_tokens=self.new_tokens,
        )


def examples_of(path: str, split: str, other: str) -> str:
    """Where the split `other` is of the data whose `split` is at `path`.

    That is the file beside it (`train.jsonl` of `test.jsonl`), or the same folder or
    data set of the hub; empty: nowhere.
    """
    if split == other:
        return ""
    file = expanded(path)
    if not os.path.isfile(file):
        return path
    for found in re.finditer(re.escape(split), file.name):
        name = file.name[: found.start()] + other + file.name[found.end() :]
        if os.path.isfile(file.with_name(name)):
            return str(file.with_name(name))
    return ""


def no_examples(task: str, field: str, path: str, split: str) -> ValueError:
    """The error of worked examples that are nowhere."""
    return ValueError(
        f"Task {task!r} needs `{field}`: a file of problems for the worked examples "
        f"(the split {split!r}); there is none beside {shown(path)}. Without examples: "
        "`shots: 0`."
    )
