"""SCBench's strings that are asked by how they begin and end."""

import dataclasses
import math
import random
import string
from typing import Annotated, ClassVar

from kvjax.eval.tasks.base import Episode, Task, Turn
from kvjax.eval.tasks.words import distinct
from kvjax.fields import Range

BEFORE = (
    "Find the string that begins with the given prefix and ends with the given suffix "
    "in the list of strings below.\n\n"
)
QUESTION = '\nPrefix: "{prefix}"\nSuffix: "{suffix}"\nThe string is: '
SHORTEST, LONGEST = 65, 122
"""Letters of a string."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixSuffix(Task):
    """Random strings; one is asked by its first and its last letters.

    Several strings begin with the same prefix, and several end with the same suffix;
    only one does both.

    Attributes:
        ends: letters of a prefix and of a suffix.

    Source: Li et al. 2024, SCBench, `scbench_prefix_suffix`: strings of 65 to 122
        letters, a reply that contains the one. Deviation: its generator and its
        wording are not published, so both are ours, and scores compare only in kind.
    """

    unit: ClassVar[str] = "strings"

    ends: Annotated[int, Range(2, 30)] = 8

    @property
    def max_new_tokens(self) -> int:
        """As published."""
        return 150

    def episode(self, rng: random.Random, size: int, turns: int = 1) -> Episode:
        """See `Task.episode`; so many strings, and one for each question at least."""
        size = max(size, turns)
        many = math.isqrt(2 * size) + 1  # half of the pairs of ends are in use
        ends = distinct(lambda: _letters(rng, self.ends), 2 * many)
        used = rng.sample(range(many * many), size)
        known = [(ends[at // many], ends[many + at % many]) for at in used]
        strings = [
            begin + _letters(rng, rng.randint(SHORTEST, LONGEST) - 2 * self.ends) + end
            for begin, end in known
        ]
        turn_of = [
            Turn(
                question=QUESTION.format(prefix=known[at][0], suffix=known[at][1]),
                answer=strings[at],
                answers=(strings[at],),
                meta={"prefix": known[at][0], "suffix": known[at][1]},
            )
            for at in rng.sample(range(size), turns)
        ]
        text = ", ".join(f'"{one}"' for one in strings)
        return Episode(context=f"{BEFORE}[{text}]\n", turns=tuple(turn_of))

    def score(self, item: Turn, reply: str) -> float:
        """1 if the reply contains the string."""
        return float(item.answers[0] in reply)


def _letters(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=count))
