"""Few-shot rule induction: apply a code known from worked shots only."""

import dataclasses
import random
import string
from collections.abc import Sequence
from typing import Annotated, ClassVar, final

from kvjax.eval.tasks.base import Episode, Turn
from kvjax.eval.tasks.filler import scatter, sentences
from kvjax.eval.tasks.records import RecordTask, before_stop, too_short
from kvjax.fields import Range

MAX_SHOTS = 8


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Induction(RecordTask):
    r"""Shots `[3:k 7:b 1:x]\n`, each digit with its letter under this item's rule.

    The rule is a random digit-to-letter code. The question `[7:? 3:? 7:?]` asks for
    the code of digits that occur in some shot; the reply writes `7:b 3:k 7:b]`. One
    shot per line: a newline delimits shots.

    Attributes:
        shots: worked examples; None draws 1 to 8 per item.
        width: digits of a shot, and of the question.
        symbols: different digits the item uses at most (fewer if the shots show fewer).
    """

    name: ClassVar[str] = "induction"

    shots: Annotated[int, Range(1, 4096)] | None = None
    width: Annotated[int, Range(1, 4096)] = 3
    symbols: Annotated[int, Range(1, 10)] = 8

    @property
    def max_new_tokens(self) -> int:
        """Pairs and stop."""
        return 4 * self.width

    def episode(self, rng: random.Random, size: int, turns: int = 1) -> Episode:
        """See `Task.episode`."""
        shot_chars = 4 * self.width + 2
        turn_chars = 8 * self.width + 8
        fit = (size - turn_chars) // shot_chars
        shots = self.shots or rng.randint(1, max(1, min(MAX_SHOTS, fit)))
        if shots > fit:
            raise too_short(self.name, size, turn_chars + shots * shot_chars)
        turns = max(1, min(turns, (size - shots * shot_chars) // turn_chars))
        known = min(self.symbols, self.width * shots)
        plain = rng.sample(string.digits, known)
        rule = dict(zip(plain, rng.sample(string.ascii_lowercase, known), strict=True))
        digits = plain + rng.choices(plain, k=self.width * shots - known)
        rng.shuffle(digits)
        records = [
            f"[{written(rule, digits[i : i + self.width])}]\n"
            for i in range(0, len(digits), self.width)
        ]
        spare = size - shots * shot_chars - turns * turn_chars
        filler = sentences(rng, spare, self.redundancy)
        unknown = dict.fromkeys(plain, "?")
        asked = [rng.choices(plain, k=self.width) for _ in range(turns)]
        return Episode(
            context=scatter(rng, records, filler),
            turns=tuple(
                Turn(
                    question=f"\n? [{written(unknown, shown)}]\n= [",
                    answer=written(rule, shown) + "]",
                    meta={"value": written(rule, shown), "shots": shots},
                )
                for shown in asked
            ),
        )

    def score(self, item: Turn, reply: str) -> float:
        """1 if every digit has its letter."""
        return float(before_stop(reply) == item.meta["value"])


def written(rule: dict[str, str], digits: Sequence[str]) -> str:
    """`7:b 3:k`: each digit with its letter."""
    return " ".join(f"{digit}:{rule[digit]}" for digit in digits)
