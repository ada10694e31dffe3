"""LongGenBench: one reply that answers many problems, each by its number.

Source: Liu et al. 2024. Its released scorer is `published` here; what is wrong with it:
it takes commas out of replies but not out of the right answers (a perfect reply scores
691 of the first 700 problems of GSM8K), has no signs, takes `18.00` for another number
than `18`, sees no answer that begins on the line of its mark, ends an answer at a blank
line, pairs answers with problems by their place and not by their number, and counts
only the answers that it found. `corrected` does none of that.
"""

import dataclasses
import re
from collections.abc import Sequence

from kvjax.eval.metrics.answers import said_letter, said_number
from kvjax.eval.metrics.numbers import number

_MARK = re.compile(r"\bAnswer_(\d{1,9})\b")
_NEXT = re.compile(r"\n[^\w\n]*Question_\d")
_DECIMAL = re.compile(r"\d+(?:\.\d+)?")
_SPAN = re.compile(r":\n(.*?)(?:\n\n|\Z)", re.DOTALL)
PARTS = 10


@dataclasses.dataclass(frozen=True)
class Answered:
    """What became of each problem, in the order of their numbers.

    Attributes:
        right: True, False, or None for a problem without an answer.
    """

    right: tuple[bool | None, ...]

    @property
    def accuracy(self) -> float:
        """Right answers over all problems."""
        return sum(one is True for one in self.right) / len(self.right)

    @property
    def coverage(self) -> float:
        """Problems with an answer over all problems."""
        return sum(one is not None for one in self.right) / len(self.right)

    @property
    def accuracy_given_answered(self) -> float | None:
        """Right answers over those there are; None without any."""
        there = [one for one in self.right if one is not None]
        return sum(there) / len(there) if there else None

    @property
    def by_decile(self) -> tuple[float | None, ...]:
        """Accuracy of each tenth of the problems; None where a tenth has none."""
        count = len(self.right)
        parts = [
            self.right[i * count // PARTS : (i + 1) * count // PARTS]
            for i in range(PARTS)
        ]
        return tuple(
            sum(one is True for one in part) / len(part) if part else None
            for part in parts
        )


def corrected(
    wanted: Sequence[str], first: int, reply: str, letters: str = ""
) -> Answered:
    """Answers found by their numbers, and compared by their values.

    Args:
        wanted: right answers: numbers, or letters.
        first: the number of the first problem.
        reply: what was written.
        letters: those to choose from; none: numbers are wanted.
    """
    texts: dict[int, str] = {}
    marks = [*_MARK.finditer(reply)]
    ends = [*(mark.start() for mark in marks), len(reply)][1:]
    for mark, end in zip(marks, ends, strict=True):
        text = _NEXT.split(reply[mark.end() : end], maxsplit=1)[0]
        texts.setdefault(int(mark[1]), text.lstrip("*: "))
    found: list[bool | None] = []
    for index, right in enumerate(wanted, first):
        text = texts.get(index, "")
        if letters:
            letter = said_letter(text, letters)
            found.append(None if letter is None else letter == right)
        else:
            value = said_number(text)
            found.append(None if value is None else value == number(right))
    return Answered(tuple(found))


def published(wanted: Sequence[str], reply: str, letters: str = "") -> float:
    """The score of the released scorer, with what is wrong with it; see the module."""
    spans = _SPAN.findall("\n".join(reply.split("Answer_")))
    pattern = re.compile(f"[{letters}]") if letters else _DECIMAL
    found = [
        pattern.findall(span if letters else span.replace(",", "")) for span in spans
    ]
    said = [every[-1] for every in found if every]
    pairs = [*zip(said, wanted, strict=False)]
    right = sum(one == pattern.findall(other)[-1] for one, other in pairs)
    return right / len(pairs) if pairs else 0.0
