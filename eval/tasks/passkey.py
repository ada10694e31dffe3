"""A number hidden in other text: the passkey of InfiniteBench and SCBench."""

import dataclasses
import pathlib
import random
from collections.abc import Mapping
from typing import Annotated, ClassVar, final

from kvjax.eval.tasks.base import Episode, Task, Turn
from kvjax.eval.tasks.essays import essay_files, passage, sentences
from kvjax.eval.tasks.filler import scatter
from kvjax.eval.tasks.matching import numbers
from kvjax.eval.tasks.ruler.needle import NOISE
from kvjax.eval.tasks.words import number
from kvjax.fields import OneOf, Range, Share

BEFORE = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and "
    "memorize it. I will quiz you about the important information.\n\n"
)
KEY = "The pass key is {key}. Remember it. {key} is the pass key.\n"


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Passkey(Task):
    """`The pass key is 48219. Remember it.` in other text.

    Attributes:
        haystack: the text: noise that repeats, or essays of yours.
        digits: of the key.
        depth: place of the key as a fraction of the text, or None for anywhere.
        essays: see `Needle`.

    Source: Zhang et al. 2024, github.com/OpenBMB/InfiniteBench, `passkey`; Li et al.
        2024, github.com/microsoft/MInference, `scbench_passkey`. Deviation: the first
        digit is no zero.
    """

    name: ClassVar[str] = "passkey"
    unit: ClassVar[str] = "sentences"
    multi_turn: ClassVar[bool] = False

    haystack: Annotated[str, OneOf("noise", "essay")] = "noise"
    digits: Annotated[int, Range(1, 12)] = 5
    depth: Share | None = None
    essays: str = ""

    @property
    def max_new_tokens(self) -> int:
        """As published for five digits, and one for each beyond."""
        return 15 + max(0, self.digits - 5)

    def episode(self, rng: random.Random, size: int, turns: int = 1) -> Episode:
        """See `Task.episode`; lines of noise, or sentences of essays."""
        del turns
        key = number(rng, self.digits)
        hay = [f"{NOISE}\n"] * size
        if self.haystack == "essay":
            hay = [f"{one}\n" for one in passage(rng, sentences(self.essays), size)]
        text = scatter(rng, [KEY.format(key=key)], hay, [self.depth])
        turn = Turn(
            question="What is the pass key?",
            answer=f" The pass key is {key}.",
            answers=(key,),
            meta={"key": key, "depth": self.depth},
        )
        return Episode(context=f"{BEFORE}{text}\n\n", turns=(turn,))

    def files(self) -> Mapping[str, pathlib.Path]:
        """See `Task.files`; the essays, where these are the text."""
        essays = essay_files(self.essays) if self.haystack == "essay" else {}
        return {**super().files(), **essays}

    def score(self, item: Turn, reply: str) -> float:
        """1 if the first number of the reply is the key."""
        return float(numbers(reply)[:1] == [item.answers[0]])
