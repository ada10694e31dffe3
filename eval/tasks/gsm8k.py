"""GSM8K: arithmetic in words, solved step by step behind worked examples."""

import dataclasses
import re
from typing import ClassVar, final

from kvjax.eval.metrics.answers import said_number
from kvjax.eval.metrics.numbers import number
from kvjax.eval.tasks.base import Turn
from kvjax.eval.tasks.reading_files import Record
from kvjax.eval.tasks.shots import FewShot, Problem

_CALCULATOR = re.compile(r"<<[^<>]*>>")
SAYS = "The answer is"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solved:
    """A row of GSM8K.

    Attributes:
        question: the problem.
        steps: its solution, without marks for calculators.
        value: the result as it is written there.
    """

    question: str
    steps: str
    value: str


def solved(row: Record) -> Solved:
    """The problem of a row, its steps and its result.

    Raises:
        ValueError: the answer does not end in `#### 18`; names file and row.
    """
    steps, mark, value = row.text("answer").rpartition("####")
    if not mark or number(value) is None:
        raise row.wrong("answer", "steps and behind them `#### ` with the result")
    return Solved(
        question=row.text("question").strip(),
        steps=_CALCULATOR.sub("", steps).strip(),
        value=value.strip(),
    )


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class GSM8K(FewShot):
    """Problems of GSM8K; a reply is right if its number is, whatever its steps.

    `18`, `18.00`, `$18` and `1,234`, `1234` are the same numbers; a minus counts.

    Source: Cobbe et al. 2021, asked as in KVFundaBench with 8 examples. Deviation: the
    examples are the first of the training split with its own steps, not the eight of
    Wei et al. 2022.
    """

    name: ClassVar[str] = "gsm8k"
    stop: ClassVar[str] = "\nQuestion:"
    columns: ClassVar[tuple[str, ...]] = ("question", "answer")
    given: ClassVar[tuple[str, ...]] = ("gsm8k", "test.jsonl.gz")
    shots_split: ClassVar[str] = "train"

    def problem(self, row: Record) -> Problem:
        one = solved(row)
        return Problem(
            place=row.place,
            question=f"Question: {one.question}\n",
            prefix="Answer:",
            answer=f" {one.steps}\n{SAYS} {one.value}.",
            meta={"value": one.value},
        )

    def score(self, item: Turn, reply: str) -> float:
        """1 for the right number."""
        said = said_number(self.cut(reply))
        return float(said is not None and said == number(item.meta["value"]))
