"""RULER's needles in a haystack: which value was written beside this key?"""

import dataclasses
import pathlib
import random
from collections.abc import Mapping
from typing import Annotated, ClassVar

from kvjax.eval.tasks.base import Episode, Task, Turn
from kvjax.eval.tasks.essays import essay_files, passage, sentences
from kvjax.eval.tasks.filler import scatter
from kvjax.eval.tasks.matching import share_found
from kvjax.eval.tasks.words import Kind, named, pairs
from kvjax.fields import OneOf, Range, Share

NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. "
    "There and back again."
)
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize "
    "it. I will quiz you about the {kind} afterwards.\n",
    "What is the special magic {kind} for {query} mentioned in the provided text? ",
    "The special magic {kind} for {query} mentioned in the provided text is",
)
SOME = (
    "Some special magic {kind} are hidden within the following text. Make sure to "
    "memorize it. I will quiz you about the {kind} afterwards.\n",
    "What are all the special magic {kind} for {query} mentioned in the provided "
    "text? ",
    "The special magic {kind} for {query} mentioned in the provided text are",
)
"""What comes before the text, the question and the beginning of the reply."""

Few = Annotated[int, Range(1, 4096)]
Hay = Annotated[str, OneOf("noise", "essay", "needle")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needle(Task):
    """`One of the special magic numbers for amber-acorn is: 4821930.` in other text.

    Several questions about one context ask different keys: those that one question
    would ask are dealt out, and all keys take part.

    Attributes:
        haystack: the text: noise that repeats, essays of yours, or needles whose keys
            are not asked.
        keys: needles' keys, those in the haystack not counted; at least `queries`.
        values: of each key, in a needle each.
        queries: keys that a question asks.
        key_kind: what keys are: words, numbers or uuids.
        value_kind: what values are.
        depth: place of the asked needle as a fraction of the context, or None for
            anywhere; of several, the first asked.
        essays: a text file, or a folder of them; empty: `lm/gutenberg` in the folder
            that the environment variable KVJAX_DATA names, else sentences made up.
        words: a file with a word in each line, or a folder with `adjectivelist.txt` and
            `nounlist.txt`; empty: kvjax's own.

    Source: Hsieh et al. 2024, github.com/NVIDIA/RULER, `niah.py`. Deviations: (1) other
        essays and other words than there, where none are given; (2) essays begin at a
        random sentence instead of at their first, and a needle may stand behind any
        sentence instead of at one of 40 depths; (3) no key and no value stands twice.
    """

    unit: ClassVar[str] = "sentences"
    paths: ClassVar[tuple[str, ...]] = ("words",)

    haystack: Hay = "noise"
    keys: Few = 1
    values: Few = 1
    queries: Few = 1
    key_kind: Kind = "words"
    value_kind: Kind = "numbers"
    depth: Share | None = None
    essays: str = ""
    words: str = ""

    @property
    def max_new_tokens(self) -> int:
        """As RULER has it, and 40 for each value beyond the fourth."""
        return 128 + 40 * max(0, self.queries * self.values - 4)

    def episode(self, rng: random.Random, size: int, turns: int = 1) -> Episode:
        """See `Task.episode`; lines of noise, sentences of essays, or needles."""
        keys = max(self.keys, self.queries)
        if self.haystack == "needle":  # one question more asks one needle more
            keys = max(keys, self.queries * turns)
        found = self._pairs(rng, keys, {})
        asked = self._asked(rng, list(found), turns)
        needles = [
            (NEEDLE.format(kind=self.value_kind, key=key, value=value), key)
            for key, values in found.items()
            for value in values
        ]
        rng.shuffle(needles)
        first = next(at for at, (_, key) in enumerate(needles) if key == asked[0][0])
        depths: list[float | None] = [None] * len(needles)
        depths[first] = self.depth
        end = " " if self.haystack == "essay" else "\n"
        hay = [line + end for line in self._hay(rng, size, found)]
        text = scatter(rng, [line + end for line, _ in needles], hay, depths)
        asks = self.queries * self.values
        before = self._wording(asks)[0].format(kind=self._kind(asks))
        return Episode(
            context=f"{before}{text.removesuffix(end)}\n",
            turns=tuple(self._turn(keys, found) for keys in asked),
        )

    def files(self) -> Mapping[str, pathlib.Path]:
        """See `Task.files`; the essays, where these are the text."""
        essays = essay_files(self.essays) if self.haystack == "essay" else {}
        return {**super().files(), **essays}

    def score(self, item: Turn, reply: str) -> float:
        """Share of the values that the reply contains."""
        return share_found(reply, item.answers)

    def _pairs(
        self, rng: random.Random, keys: int, taken: Mapping[str, list[str]]
    ) -> dict[str, list[str]]:
        """Keys with their values, none of which is in `taken`."""
        words = pairs(self.words) if "words" in (self.key_kind, self.value_kind) else ()
        known = {*taken, *(v for values in taken.values() for v in values)}
        names = named(rng, self.key_kind, keys, words, known)
        number = keys * self.values
        values = named(rng, self.value_kind, number, words, known | set(names))
        return {
            key: values[at * self.values : (at + 1) * self.values]
            for at, key in enumerate(names)
        }

    def _asked(
        self, rng: random.Random, keys: list[str], turns: int
    ) -> list[tuple[str, ...]]:
        """The keys of each question."""
        if turns == 1:
            return [tuple(rng.sample(keys, self.queries))]
        each = max(1, min(self.queries, len(keys) // turns))
        turns = min(turns, len(keys) // each)
        picked = rng.sample(keys, turns * each)
        return [tuple(picked[at * each : (at + 1) * each]) for at in range(turns)]

    def _hay(
        self, rng: random.Random, size: int, found: dict[str, list[str]]
    ) -> list[str]:
        if self.haystack == "noise":
            return [NOISE] * size
        if self.haystack == "essay":
            return passage(rng, sentences(self.essays), size)
        others = dataclasses.replace(self, values=1)._pairs(rng, size, found)
        return [
            NEEDLE.format(kind=self.value_kind, key=key, value=value)
            for key, (value,) in others.items()
        ]

    def _kind(self, values: int) -> str:
        return self.value_kind if values > 1 else self.value_kind[:-1]

    def _wording(self, values: int) -> tuple[str, str, str]:
        return SOME if values > 1 else ONE

    def _turn(self, keys: tuple[str, ...], found: dict[str, list[str]]) -> Turn:
        values = tuple(value for key in keys for value in found[key])
        _, question, prefix = self._wording(len(values))
        kind = self._kind(len(values))
        query = keys[0]
        if len(keys) > 1:
            query = f"{', '.join(keys[:-1])}, and {keys[-1]}"
        return Turn(
            question=question.format(kind=kind, query=query),
            prefix=prefix.format(kind=kind, query=query),
            answer=f" {', '.join(values)}",
            answers=values,
            meta={"key": query, "keys": len(found), "depth": self.depth},
        )
