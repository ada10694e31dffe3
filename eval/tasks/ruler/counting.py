"""RULER's aggregation: which words of a long list are the most frequent?"""

import dataclasses
import random
import string
from collections.abc import Callable
from typing import Annotated, ClassVar

from scipy.special import zeta

from kvjax.eval.tasks.base import Episode, Measure, Task, Turn
from kvjax.eval.tasks.matching import share_found
from kvjax.eval.tasks.words import chosen, distinct, single
from kvjax.fields import Range

LONG = 4096
"""From this length on RULER repeats words more often."""

Often = Annotated[int, Range(1, 10_000)]
LIST = (
    "Below is a numbered list of words. In these words, some appear more often than "
    "others. Memorize the ones that appear most often.\n"
)
COMMON = "Question: What are the {count} most common words in the above list? "
COMMON_PREFIX = "Answer: The top {count} words that appear most often in the list are:"
CODED = (
    "Read the following coded text and track the frequency of each coded word. Find "
    "the three most frequently appeared coded words. "
)
FREQUENT = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are "
    "the three most frequently appeared words in the above coded text? "
)
FREQUENT_PREFIX = (
    "Answer: According to the coded text above, the three most frequently appeared "
    "words are:"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonWords(Task):
    """`1. amber 2. lake 3. amber` and so on: the ten words that stand there most often.

    Attributes:
        common: how many frequent words there are, all of which are asked.
        repeats: how often each stands in the list; None: 30 times, and 6 where an
            episode may be shorter than 4096.
        others: how often each of the other words does; None: 3 times, and once there.
        example: whether another such list with its answer stands before.
        words: a file with a word in each line, or a folder of `nounlist.txt`,
            `adjectivelist.txt` and `verblist.txt`; empty: kvjax's own.

    Source: Hsieh et al. 2024, github.com/NVIDIA/RULER, `common_words_extraction.py`.
        Deviation: other words, if none are given; more than there are plain ones are
        pairs with a hyphen.
    """

    unit: ClassVar[str] = "words"
    paths: ClassVar[tuple[str, ...]] = ("words",)
    multi_turn: ClassVar[bool] = False

    common: Annotated[int, Range(1, 100)] = 10
    repeats: Often | None = None
    others: Often | None = None
    example: bool = True
    words: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._often <= self._seldom:
            raise ValueError(
                f"`repeats` must be more than `others`: frequent words stand "
                f"{self._often} times in the list, others {self._seldom} times."
            )

    @property
    def max_new_tokens(self) -> int:
        """As RULER has it for ten words, and 12 for each beyond."""
        return 120 + 12 * max(0, self.common - 10)

    @property
    def _often(self) -> int:
        return self.repeats or 30

    @property
    def _seldom(self) -> int:
        return self.others or 3

    def fitted(
        self,
        draw: Callable[[], random.Random],
        length: int,
        measure: Measure | None = None,
        turns: int = 1,
    ) -> Episode:
        """See `Task.fitted`; how often words stand there is as the length has it."""
        if length >= LONG or (self.repeats is not None and self.others is not None):
            return super().fitted(draw, length, measure, turns)
        few = dataclasses.replace(
            self, repeats=self.repeats or 6, others=self.others or 1
        )
        return super(CommonWords, few).fitted(draw, length, measure, turns)

    def episode(self, rng: random.Random, size: int, turns: int = 1) -> Episode:
        """See `Task.episode`; so many words that are seldom."""
        del turns
        shot = ""
        if self.example:
            few = (3, 1, 10) if self._often <= 6 else (10, 3, 30)
            text, one = self._list(rng, *few)
            shot = f"{text}{one.question}{one.prefix}{one.answer}\n"
        text, turn = self._list(rng, self._often, self._seldom, size)
        return Episode(context=shot + text, turns=(turn,))

    def score(self, item: Turn, reply: str) -> float:
        """Share of the frequent words that the reply contains."""
        return share_found(reply, item.answers)

    def _list(
        self, rng: random.Random, often: int, seldom: int, size: int
    ) -> tuple[str, Turn]:
        """A list, and the question about it."""
        count = self.common + size
        words = chosen(rng, single(count, self.words), count)
        asked = words[: self.common]
        entries = asked * often + words[self.common :] * seldom
        rng.shuffle(entries)
        turn = Turn(
            question=COMMON.format(count=self.common),
            prefix=COMMON_PREFIX.format(count=self.common),
            answer=f" {numbered(asked)}",
            answers=tuple(asked),
            meta={"words": len(entries), "different": count},
        )
        return f"{LIST}{numbered(entries)}\n", turn


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequentWords(Task):
    """Words without meaning, as often as Zipf's law has it: the three most frequent.

    Of `size` words the one of rank k stands there `size * k ** -alpha / zeta(alpha)`
    times, rounded down. The first is `...`, which is noise.

    Attributes:
        alpha: of Zipf's law; the larger, the more frequent the frequent ones.
        letters: of a word.

    Source: Hsieh et al. 2024, github.com/NVIDIA/RULER, `freq_words_extraction.py`.
        Deviations: (1) no word is as frequent as the third that is asked; (2) there
        are as many different words as the law has, instead of one for 50 tokens at
        most, which with `alpha: 2` are more.
    """

    unit: ClassVar[str] = "words"
    multi_turn: ClassVar[bool] = False

    alpha: Annotated[float, Range(1.1, 10)] = 2.0
    letters: Annotated[int, Range(4, 32)] = 6

    @property
    def max_new_tokens(self) -> int:
        """As RULER has it."""
        return 50

    def smallest(self, length: int) -> int:
        """The last word that is asked stands there once."""
        del length
        return int(4**self.alpha * float(zeta(self.alpha))) + 1

    def episode(self, rng: random.Random, size: int, turns: int = 1) -> Episode:
        """See `Task.episode`; so many words, the cut ones included.

        Raises:
            ValueError: too few for three different ones.
        """
        del turns
        if size < self.smallest(0):
            raise ValueError(
                f"Task {self.name!r} needs {self.smallest(0)} words for its question; "
                f"got {size}. Raise the length, or lower `alpha`."
            )
        counts = self.counts(size)
        draw = string.ascii_lowercase
        words = distinct(
            lambda: "".join(rng.choices(draw, k=self.letters)), len(counts) - 1
        )
        entries = [
            word
            for word, count in zip(["...", *words], counts, strict=True)
            for _ in range(count)
        ]
        rng.shuffle(entries)
        turn = Turn(
            question=FREQUENT,
            prefix=FREQUENT_PREFIX,
            answer=f" {', '.join(words[:3])}",
            answers=tuple(words[:3]),
            meta={"words": len(entries), "different": len(words)},
        )
        return Episode(context=f"{CODED}{' '.join(entries)}\n", turns=(turn,))

    def score(self, item: Turn, reply: str) -> float:
        """Share of the three words that the reply contains."""
        return share_found(reply, item.answers)

    def counts(self, size: int) -> list[int]:
        """How often the word of each rank stands there, from the noise on."""
        scale = size / float(zeta(self.alpha))
        most = int(scale ** (1 / self.alpha)) + 1
        counts = [int(scale * rank**-self.alpha) for rank in range(1, most + 1)]
        asked = counts[:4]
        rest = [min(count, asked[-1] - 1) for count in counts[4:]]
        return asked + [count for count in rest if count]


def numbered(words: list[str]) -> str:
    """`1. amber 2. lake`."""
    return " ".join(f"{at}. {word}" for at, word in enumerate(words, 1))
