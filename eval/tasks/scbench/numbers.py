"""SCBench's statistics of a long list of numbers."""

import dataclasses
import random
from typing import Annotated, ClassVar

from kvjax.eval.tasks.base import Episode, Task, Turn
from kvjax.eval.tasks.matching import numbers
from kvjax.fields import Range

ASKED = (
    "largest",
    "second largest",
    "third largest",
    "smallest",
    "second smallest",
    "third smallest",
    "median",
)
QUESTION = (
    "What is the {which} number of the list?\n\nYou should answer with only one "
    "number, no other words. The {which} number of the list is: "
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MathFind(Task):
    """A list of numbers; its largest, its smallest, its median and so on are asked.

    Numbers that are equal count once, except for the median. The smallest lies in the
    first fifth of the range and the largest in the last, so that neither is known
    without the list.

    Attributes:
        largest: that a number may be; none is below 0.

    Source: Zhang et al. 2024, github.com/OpenBMB/InfiniteBench, `math_find`; Li et al.
        2024, github.com/microsoft/MInference, `scbench_mf`. Deviations: (1) nothing
        stands before the list, where the first question does there; (2) lists are of
        odd lengths, so that the median is one of the numbers.
    """

    unit: ClassVar[str] = "numbers"

    largest: Annotated[int, Range(20, 99_999)] = 999

    @property
    def max_new_tokens(self) -> int:
        """As published."""
        return 5

    def episode(self, rng: random.Random, size: int, turns: int = 1) -> Episode:
        """See `Task.episode`; so many numbers, rounded to an odd one from five on."""
        size = max(size, 5) // 2 * 2 + 1
        low = rng.randint(0, self.largest // 5)
        high = rng.randint(self.largest - self.largest // 5, self.largest)
        found = rng.sample(range(low, high + 1), 3)  # three different ones at least
        found += [rng.randint(low, high) for _ in range(size - 3)]
        rng.shuffle(found)
        asked = rng.sample(ASKED, min(turns, len(ASKED)))
        return Episode(
            context=f"{found}\n\n",
            turns=tuple(
                Turn(
                    question=QUESTION.format(which=which),
                    answer=str(number),
                    answers=(str(number),),
                    meta={"which": which, "numbers": size},
                )
                for which, number in ((one, _statistic(found, one)) for one in asked)
            ),
        )

    def score(self, item: Turn, reply: str) -> float:
        """1 if the first number of the reply is the right one."""
        return float(numbers(reply)[:1] == [item.answers[0]])


def _statistic(listed: list[int], which: str) -> int:
    if which == "median":
        return sorted(listed)[len(listed) // 2]
    *rank, end = which.split()
    place = {"": 0, "second": 1, "third": 2}["".join(rank)]
    return sorted(set(listed), reverse=end == "largest")[place]
