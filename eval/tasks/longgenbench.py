"""LongGenBench: many problems of GSM8K, MMLU or CommonsenseQA in one long reply."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, final

from kvjax import messages
from kvjax.eval.metrics.long_reply import Answered, corrected, published
from kvjax.eval.tasks.base import Episode, Turn
from kvjax.eval.tasks.choosing import CSQA, MMLU, Options, csqa_options, mmlu_options
from kvjax.eval.tasks.from_files import Draft, FileTask, given_file
from kvjax.eval.tasks.gsm8k import GSM8K, SAYS, solved
from kvjax.eval.tasks.reading_files import Record, read_records
from kvjax.eval.tasks.shots import FewShot, Shots, examples_of, no_examples
from kvjax.fields import OneOf, Positive, Range


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A problem of a row.

    Attributes:
        place: where it stands, for messages.
        question: as it is asked.
        solution: what a perfect reply says.
        wanted: the number or the letter.
        letters: those to choose from; empty for numbers.
        group: its subject.
    """

    place: str
    question: str
    solution: str
    wanted: str
    letters: str = ""
    group: str = ""


def _of_gsm8k(row: Record) -> Entry:
    one = solved(row)
    return Entry(
        place=row.place,
        question=one.question,
        solution=f"{one.steps}\n{SAYS} {one.value}.",
        wanted=one.value,
    )


def _of_choice(row: Record, one: Options) -> Entry:
    pairs = zip(one.letters, one.texts, strict=True)
    return Entry(
        place=row.place,
        question=one.question + "\n" + "".join(f"({a}) {text}" for a, text in pairs),
        solution=f"{SAYS} ({one.letter}).",
        wanted=one.letter,
        letters=one.letters,
        group=one.group,
    )


_SOURCES: dict[str, tuple[type[FewShot], Callable[[Record], Entry], int]] = {
    "gsm8k": (GSM8K, _of_gsm8k, 8),
    "mmlu": (MMLU, lambda row: _of_choice(row, mmlu_options(row)), 5),
    "csqa": (CSQA, lambda row: _of_choice(row, csqa_options(row)), 4),
}
"""Of each source: whose columns and files it has, how it is read, its examples."""


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class LongGenBench(FileTask):
    """K problems, answered one after the other in a single reply.

    The context holds worked examples, all questions first and then all answers; the
    question holds the problems, whose numbers go on behind those of the examples. The
    file is taken K rows at a time (of MMLU the first K of each subject); rows that are
    left over are not asked. `cut` leaves out examples.

    Source: Liu et al. 2024 (`LongGenBench` of GSM8K, MMLU, CommonsenseQA). Deviations:
    the examples are rows of a file, with its own steps (GSM8K) or none, not those of
    Wei et al. 2022; the instruction is in our words; items are chosen by a seed from
    the whole file, where the release takes the first ones; the right scorer by default.

    Attributes:
        source: `gsm8k`, `mmlu` or `csqa`: the layout of the files.
        path: of the problems; empty: below `KVJAX_DATA`.
        config: of a hub id or a folder.
        split: of a hub id or a folder; empty: that of the source.
        problems: K.
        shots: worked examples; None: 8 of GSM8K, 5 of MMLU, 4 of CommonsenseQA.
        exemplars: the file that they are the first rows of (of MMLU the first of the
            subject); empty: the split of examples beside `path`, or `path` itself where
            there is none (CommonsenseQA); the problems are others then.
        order: of the problems of a reply: shortest first, or as in the file.
        scorer: `corrected`, or `published` with its faults
            (`kvjax.eval.metrics.long_reply`).
        new_tokens: of a reply, at most.
    """

    name: ClassVar[str] = "longgenbench"
    unit: ClassVar[str] = "problems"
    multi_turn: ClassVar[bool] = False
    system: ClassVar[str] = (
        "Answer every question, step by step, in the form of the examples. Begin each "
        "answer with its mark, Answer_ and the number of the question, and end it with "
        "the phrase: The answer is. Do not repeat the questions. Answer all of them."
    )

    source: Annotated[str, OneOf(*_SOURCES)] = "gsm8k"
    path: str = ""
    config: str = ""
    split: str = ""
    problems: Annotated[int, Range(1, 1000)] = 35
    shots: Shots | None = None
    exemplars: str = ""
    order: Annotated[str, OneOf("ascending", "file")] = "ascending"
    scorer: Annotated[str, OneOf("corrected", "published")] = "corrected"
    new_tokens: Positive = 4096

    @property
    def max_new_tokens(self) -> int:
        """As the field says."""
        return self.new_tokens

    def place(self) -> str:
        """See `FileTask.place`."""
        kind = _SOURCES[self.source][0]
        return given_file(self.name, "path", self.path, *kind.given)

    def drafts(self, turns: int) -> Sequence[Draft]:
        """See `FileTask.drafts`; each has one question."""
        del turns
        kind, _, shots = _SOURCES[self.source]
        shots = shots if self.shots is None else self.shots
        split = self.split or kind.__dataclass_fields__["split"].default
        path = self.place()
        entries = self._read("path", path, split)
        known: list[Entry] = []
        if shots:
            place = self._exemplars(path, split)
            known = self._read("exemplars", place) if place else entries
        groups: dict[str, list[Entry]] = {}
        for one in entries:
            groups.setdefault(one.group, []).append(one)
        made = []
        for group, mine in groups.items():
            shown = [one for one in known if one.group == group][:shots]
            if len(shown) < shots:
                which = f" of {messages.shown(group)}" if group else ""
                raise ValueError(
                    f"Task {self.name!r} has {len(shown)} worked examples"
                    f"{which}; `shots` asks for {shots}. "
                    "Lower it, or give `exemplars`."
                )
            mine = [one for one in mine if one not in shown]
            made += [self._draft(shown, part) for part in self._parts(mine, group)]
        if not made:
            raise ValueError(
                f"Task {self.name!r} asks {self.problems} problems at once "
                f"(`problems`); the file has {max(map(len, groups.values()))} of a "
                "kind."
            )
        return made

    def _exemplars(self, path: str, split: str) -> str:
        """Where the examples are; empty: among the problems."""
        kind = _SOURCES[self.source][0]
        place = self.exemplars or examples_of(path, split, kind.shots_split)
        if not place and not kind.among:
            raise no_examples(self.name, "exemplars", path, kind.shots_split)
        return place

    def _read(self, field: str, path: str, split: str = "") -> list[Entry]:
        kind, read, _ = _SOURCES[self.source]
        rows = read_records(
            path,
            kind.columns,
            optional=kind.further,
            config=self.config,
            split=split or kind.shots_split,
            field=field,
        )
        return [read(row) for row in rows]

    def _parts(self, entries: Sequence[Entry], group: str) -> list[Sequence[Entry]]:
        count = self.problems
        starts = range(0, len(entries) - count + 1, count)
        return [entries[i : i + count] for i in (starts[:1] if group else starts)]

    def _draft(self, shown: Sequence[Entry], asked: Sequence[Entry]) -> Draft:
        if self.order == "ascending":
            asked = sorted(asked, key=lambda one: len(one.question))
        about = f"The questions are about {asked[0].group.replace('_', ' ')}.\n\n"

        def make(size: int) -> Episode:
            worked = _marked("Question", 1, [one.question for one in shown[:size]])
            worked += _marked("Answer", 1, [one.solution for one in shown[:size]])
            questions = _marked("Question", size + 1, [one.question for one in asked])
            answers = _marked("Answer", size + 1, [one.solution for one in asked])
            letters = "".join(sorted({one for e in asked for one in e.letters}))
            turn = Turn(
                question="Following Question:\n\n" + questions,
                answer=answers,
                meta={
                    "wanted": tuple(one.wanted for one in asked),
                    "first": size + 1,
                    "letters": letters,
                    "group": asked[0].group,
                },
                max_new_tokens=self.new_tokens,
            )
            context = (about if asked[0].group else "") + "Examples:\n\n" + worked
            return Episode(context=context, turns=(turn,))

        return Draft(place=asked[0].place, size=len(shown), make=make)

    def score(self, item: Turn, reply: str) -> float:
        """The share of the problems whose answer is right."""
        if self.scorer == "published":
            return published(item.meta["wanted"], reply, item.meta["letters"])
        return self.answered(item, reply).accuracy

    def answered(self, item: Turn, reply: str) -> Answered:
        """Accuracy, coverage, accuracy given an answer, accuracy by decile."""
        meta = item.meta
        return corrected(meta["wanted"], meta["first"], reply, meta["letters"])


def _marked(word: str, first: int, texts: Sequence[str]) -> str:
    """`Question_1:` and its text, a blank line behind each."""
    return "".join(f"{word}_{i}:\n{text}\n\n" for i, text in enumerate(texts, first))
