"""Few-shot rule induction: apply a letter cipher known from worked shots only."""

import dataclasses
import random
import string
from typing import ClassVar, final

from kvjax.eval.tasks.base import Episode, Item, Task, Turn, before_stop, too_short
from kvjax.eval.tasks.filler import scatter, sentences

MAX_SHOTS = 8


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Induction(Task):
    r"""Shots `[Aq Bz Cw De]\n`, each letter beside its image under this item's rule.

    The rule is a random letter-to-letter mapping; the question `[CADB>` asks for a new
    word, `wqez]`, every letter of which occurs in some shot. One shot per line: a
    newline delimits shots.

    Attributes:
        shots: worked examples; None draws 1 to 8 per item.
        width: letters of a shot and of the word asked.
        letters: letters the item uses at most (fewer if the shots show fewer).
    """

    name: ClassVar[str] = "induction"

    shots: int | None = None
    width: int = 4
    letters: int = 12

    def __post_init__(self):
        super().__post_init__()
        if self.shots is not None and self.shots < 1:
            raise ValueError(f"`shots` must be >= 1; got {self.shots}.")
        if not 1 <= self.letters <= 26 or self.width < 1:
            raise ValueError(
                "`letters` must be in [1, 26] and `width` >= 1; got "
                f"letters={self.letters}, width={self.width}."
            )

    @property
    def max_new_tokens(self) -> int:
        """Word and stop."""
        return self.width + 1

    def episode(self, rng: random.Random, length: int, turns: int = 1) -> Episode:
        """See `Task.episode`."""
        shot_chars = 3 * self.width + 2
        turn_chars = 2 * self.width + 6
        fit = (length - turn_chars) // shot_chars
        shots = self.shots or rng.randint(1, max(1, min(MAX_SHOTS, fit)))
        if shots > fit:
            raise too_short(self.name, length, turn_chars + shots * shot_chars)
        turns = max(1, min(turns, (length - shots * shot_chars) // turn_chars))
        size = min(self.letters, self.width * shots)
        plain = rng.sample(string.ascii_uppercase, size)
        rule = dict(zip(plain, rng.sample(string.ascii_lowercase, size), strict=True))
        seen = plain + rng.choices(plain, k=self.width * shots - size)
        rng.shuffle(seen)
        pairs = [letter + rule[letter] for letter in seen]
        records = [
            f"[{' '.join(pairs[i : i + self.width])}]\n"
            for i in range(0, len(pairs), self.width)
        ]
        spare = length - shots * shot_chars - turns * turn_chars
        filler = sentences(rng, spare, self.redundancy)
        asked = ["".join(rng.choices(plain, k=self.width)) for _ in range(turns)]
        return Episode(
            context=scatter(rng, records, filler),
            turns=tuple(
                Turn(
                    question=f"\n? [{word}>",
                    answer=encipher(rule, word) + "]",
                    meta={"value": encipher(rule, word), "shots": shots},
                )
                for word in asked
            ),
        )

    def score(self, item: Item, reply: str) -> float:
        """1 for the whole word."""
        return float(before_stop(reply) == item.meta["value"])


def encipher(rule: dict[str, str], word: str) -> str:
    """`word` with every letter replaced by the rule."""
    return "".join(rule[letter] for letter in word)
