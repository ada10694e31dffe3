"""K problems answered in one long reply."""

import dataclasses
import random
import re
from typing import Annotated, ClassVar, final

from kvjax.eval.tasks.base import Episode, Turn
from kvjax.eval.tasks.chain import OPERATIONS, apply
from kvjax.eval.tasks.filler import scatter, sentences
from kvjax.eval.tasks.records import RecordTask, before_stop, too_short
from kvjax.fields import Fraction, Range

MAX_PROBLEMS = 32
_QUESTION = "\n? [all "
_ANSWER = re.compile(r"(\d\d):[^;:=]*=(\d);")


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class ProblemBatch(RecordTask):
    r"""Problems `[01:3+4]\n` in filler; one reply copies and solves them all.

    The reply reads `01:3+4=7;02:5*2=0;03:]`. Arithmetic is modulo 10; the last record
    has no problem and ends the reply. One problem per line.

    Attributes:
        problems: `K`; None draws between half and all of what `density` allows.
        density: share of `length` taken by problems and reply when `problems` is None.
    """

    name: ClassVar[str] = "batch"
    multi_turn: ClassVar[bool] = False

    problems: Annotated[int, Range(1, MAX_PROBLEMS)] | None = None
    density: Fraction = 0.7

    @property
    def max_new_tokens(self) -> int:
        """Nine characters a problem, four for the end."""
        return 9 * (self.problems or MAX_PROBLEMS) + 4

    def episode(self, rng: random.Random, size: int, turns: int = 1) -> Episode:
        """See `Task.episode`."""
        del turns
        fixed = len(_QUESTION) + 6 + 4
        most = min(MAX_PROBLEMS, int(self.density * (size - fixed) / 18))
        problems = self.problems or rng.randint(max(1, most // 2), max(1, most))
        if fixed + 18 * problems > size:
            raise too_short(self.name, size, fixed + 18 * problems)
        texts = [
            f"{rng.randrange(10)}{rng.choice(OPERATIONS)}" for _ in range(problems)
        ]
        values = [str(apply(int(text[0]), text[1:])) for text in texts]
        records = [f"[{i:02d}:{text}]\n" for i, text in enumerate(texts, 1)]
        records.append(f"[{problems + 1:02d}:]\n")
        solved = [
            f"{i:02d}:{text}={value};"
            for i, (text, value) in enumerate(zip(texts, values, strict=True), 1)
        ]
        filler = sentences(rng, size - fixed - 18 * problems, self.redundancy)
        turn = Turn(
            question=_QUESTION,
            answer="".join(solved) + f"{problems + 1:02d}:]",
            meta={"problems": problems, "values": "".join(values)},
        )
        return Episode(context=scatter(rng, records, filler), turns=(turn,))

    def score(self, item: Turn, reply: str) -> float:
        """Share of the problems answered rightly, found by their number."""
        answers = dict(_ANSWER.findall(before_stop(reply)))
        values = item.meta["values"]
        right = sum(
            answers.get(f"{i:02d}") == value for i, value in enumerate(values, 1)
        )
        return right / len(values)
