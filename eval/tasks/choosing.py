"""Multiple choice behind worked examples: MMLU and CommonsenseQA."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, final

from kvjax.eval.metrics.answers import said_letter
from kvjax.eval.tasks.base import Turn
from kvjax.eval.tasks.reading_files import Record
from kvjax.eval.tasks.shots import FewShot, Problem, Shots
from kvjax.fields import OneOf, Positive

LETTERS = "ABCDEFGHIJ"

By = Annotated[str, OneOf("reply", "likelihood")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """A row of a choice.

    Attributes:
        question: what is asked.
        texts: what there is to choose from.
        letter: of the right one.
        group: the subject, where there is one.
    """

    question: str
    texts: tuple[str, ...]
    letter: str
    group: str = ""

    @property
    def letters(self) -> str:
        """Of all of them."""
        return LETTERS[: len(self.texts)]


def mmlu_options(row: Record) -> Options:
    """A row of MMLU; the answer is a letter, or counts from 0.

    Raises:
        ValueError: the row has no such columns; names file and row.
    """
    texts = row.texts("choices")
    if not 1 < len(texts) <= len(LETTERS):
        raise row.wrong("choices", f"a list of 2 to {len(LETTERS)} texts")
    given = row.values["answer"]
    letter = given.strip() if isinstance(given, str) else None
    if letter is None or letter.isdecimal():
        number = row.whole("answer")
        letter = LETTERS[number] if number < len(texts) else "?"
    if len(letter) != 1 or letter not in LETTERS[: len(texts)]:
        raise row.wrong("answer", f"a letter of {LETTERS[: len(texts)]}, or its number")
    group = row.text("subject") if "subject" in row.values else ""
    return Options(
        question=row.text("question").strip(), texts=texts, letter=letter, group=group
    )


def csqa_options(row: Record) -> Options:
    """A row of CommonsenseQA, as it was released or as the hub has it.

    Raises:
        ValueError: the row has neither layout; names file and row.
    """
    asked, choices = row.values["question"], row.values.get("choices")
    if isinstance(asked, Mapping):
        asked, choices = asked.get("stem"), asked.get("choices")
    labels, texts = _columns(choices)
    right = row.text("answerKey").strip()
    if not isinstance(asked, str) or not asked.strip():
        raise row.wrong("question", "a text, or {stem: ..., choices: [...]}")
    if not _listed(texts) or labels != list(LETTERS[: len(texts)]):
        raise row.wrong(
            "choices" if "choices" in row.values else "question",
            "one with `choices` whose labels are A, B, ... and whose texts are texts",
        )
    if right not in labels:
        raise row.wrong("answerKey", f"one of {labels}")
    return Options(question=asked.strip(), texts=tuple(texts), letter=right)


def _columns(choices: Any) -> tuple[list[Any], list[Any]]:
    """Labels and texts of choices; empty where they are neither columns nor rows."""
    if isinstance(choices, Mapping):
        labels, texts = choices.get("label"), choices.get("text")
        if isinstance(labels, list) and isinstance(texts, list):
            return labels, texts
    elif isinstance(choices, list) and all(isinstance(one, Mapping) for one in choices):
        return [c.get("label") for c in choices], [c.get("text") for c in choices]
    return [], []


def _listed(texts: list[Any]) -> bool:
    if not 1 < len(texts) <= len(LETTERS):
        return False
    return all(isinstance(one, str) and one.strip() for one in texts)


def written(one: Options) -> str:
    """The question and its choices, a line each."""
    pairs = zip(one.letters, one.texts, strict=True)
    return "\n".join([one.question, *(f"{a}. {text}" for a, text in pairs)]) + "\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choosing(FewShot):
    """A letter is chosen; see `FewShot`.

    Attributes:
        by: `reply` (what is written names a letter) or `likelihood` (the letter that is
            most likely; nothing is written).
    """

    by: By = "reply"
    new_tokens: Positive = 16

    def _problem(self, row: Record, one: Options) -> Problem:
        every = tuple(f" {letter}" for letter in one.letters)
        return Problem(
            place=row.place,
            question=written(one),
            prefix="Answer:",
            answer=f" {one.letter}",
            meta={"letter": one.letter, "letters": one.letters, "group": one.group},
            group=one.group,
            choices=every if self.by == "likelihood" else (),
        )

    def score(self, item: Turn, reply: str) -> float:
        """1 for the right letter."""
        said = said_letter(self.cut(reply), item.meta["letters"])
        return float(said == item.meta["letter"])


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class MMLU(Choosing):
    """Questions of MMLU behind five examples of their subject.

    Source: Hendrycks et al. 2021, asked as in KVFundaBench.
    """

    name: ClassVar[str] = "mmlu"
    stop: ClassVar[str] = "\n\n"
    columns: ClassVar[tuple[str, ...]] = ("question", "choices", "answer")
    further: ClassVar[tuple[str, ...]] = ("subject",)
    given: ClassVar[tuple[str, ...]] = ("mmlu", "test.jsonl.gz")
    shots_split: ClassVar[str] = "dev"

    shots: Shots = 5

    def header(self, group: str) -> str:
        about = f" about {group.replace('_', ' ')}" if group else ""
        return f"The following are multiple choice questions (with answers){about}.\n\n"

    def problem(self, row: Record) -> Problem:
        return self._problem(row, mmlu_options(row))


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class CSQA(Choosing):
    """Questions of CommonsenseQA behind four examples.

    Answers of its test split are not public, so the problems are of the development
    split, and without a training split so are the examples: others than the problem.

    Source: Talmor et al. 2019, asked as in KVFundaBench.
    """

    name: ClassVar[str] = "csqa"
    stop: ClassVar[str] = "\n\n"
    columns: ClassVar[tuple[str, ...]] = ("question", "answerKey")
    further: ClassVar[tuple[str, ...]] = ("choices",)
    given: ClassVar[tuple[str, ...]] = ("csqa", "dev.jsonl.gz")
    shots_split: ClassVar[str] = "train"
    among: ClassVar[bool] = True

    split: str = "dev"
    shots: Shots = 4

    def problem(self, row: Record) -> Problem:
        return self._problem(row, csqa_options(row))
