"""RULER's variable tracking: which names hold this number, through assignments?"""

import dataclasses
import pathlib
import random
import string
from collections.abc import Mapping
from typing import Annotated, ClassVar

from kvjax.eval.tasks.base import Episode, Task, Turn
from kvjax.eval.tasks.essays import essay_files, passage, sentences
from kvjax.eval.tasks.filler import scatter
from kvjax.eval.tasks.matching import share_found
from kvjax.eval.tasks.ruler.needle import NOISE
from kvjax.eval.tasks.words import distinct, number
from kvjax.fields import OneOf, Range

BEFORE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following "
    "text.\n\n"
)
QUESTION = (
    "Question: Find all variables that are assigned the value {value} in the text "
    "above. "
)
PREFIX = (
    "Answer: According to the chain(s) of variable assignment in the text above, "
    "{count} variables are assigned the value {value}, they are: "
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariableTracking(Task):
    """`VAR ABCDE = 12345`, `VAR FGHIJ = VAR ABCDE` and so on, in other text.

    Several questions about one context ask a chain each; where there are fewer chains
    than questions, there are as many chains as questions.

    Attributes:
        chains: of assignments.
        hops: assignments of each behind its first.
        haystack: the text: noise that repeats, or essays of yours.
        example: whether another such text with its answer stands before.
        example_lines: of noise in that.
        essays: see `Needle`.

    Source: Hsieh et al. 2024, github.com/NVIDIA/RULER, `variable_tracking.py`.
        Deviations: (1) the example has 14 lines of noise for every tokenizer, where it
        has as many as fit into 500 tokens there, and is another one in each item; (2)
        no name and no number stands twice; (3) of one chain, two assignments may
        follow each other at once.
    """

    unit: ClassVar[str] = "sentences"

    chains: Annotated[int, Range(1, 100)] = 1
    hops: Annotated[int, Range(1, 100)] = 4
    haystack: Annotated[str, OneOf("noise", "essay")] = "noise"
    example: bool = True
    example_lines: Annotated[int, Range(0, 10_000)] = 14
    essays: str = ""

    @property
    def max_new_tokens(self) -> int:
        """As RULER has it for four hops, and 6 for each beyond."""
        return 30 + 6 * max(0, self.hops - 4)

    def episode(self, rng: random.Random, size: int, turns: int = 1) -> Episode:
        """See `Task.episode`; lines of noise, or sentences of essays."""
        shot = ""
        if self.example:
            text, (one, *_) = self._tracked(rng, self.example_lines, 3, self.chains)
            shot = f"{text}{one.question}{one.prefix}{one.answer}\n\n"
        text, all_turns = self._tracked(rng, size, 5, max(self.chains, turns))
        return Episode(context=shot + text, turns=tuple(all_turns[:turns]))

    def files(self) -> Mapping[str, pathlib.Path]:
        """See `Task.files`; the essays, where these are the text."""
        essays = essay_files(self.essays) if self.haystack == "essay" else {}
        return {**super().files(), **essays}

    def score(self, item: Turn, reply: str) -> float:
        """Share of the names that the reply contains."""
        return share_found(reply, item.answers)

    def _tracked(
        self, rng: random.Random, size: int, letters: int, count: int
    ) -> tuple[str, list[Turn]]:
        """A text with assignments, and a question for each of its chains."""
        each = self.hops + 1
        names = distinct(
            lambda: "".join(rng.choices(string.ascii_uppercase, k=letters)),
            count * each,
        )
        values = distinct(lambda: number(rng, 5), count)
        chains = [names[at * each : (at + 1) * each] for at in range(count)]
        lines = [
            [f"VAR {chain[0]} = {value}"]
            + [f"VAR {b} = VAR {a} " for a, b in zip(chain, chain[1:], strict=False)]
            for chain, value in zip(chains, values, strict=True)
        ]
        order = [at for at in range(count) for _ in range(each)]
        rng.shuffle(order)
        mixed = [lines[at].pop(0) for at in order]
        text = self._hidden(rng, size, mixed)
        turns = [
            self._turn(chain, value)
            for chain, value in zip(chains, values, strict=True)
        ]
        return f"{BEFORE}{text}\n", turns

    def _hidden(self, rng: random.Random, size: int, lines: list[str]) -> str:
        if self.haystack == "noise":
            text = scatter(rng, [f"{one}\n" for one in lines], [f"{NOISE}\n"] * size)
            return text.removesuffix("\n")
        hay = [f"{one} " for one in passage(rng, sentences(self.essays), size)]
        return scatter(rng, [f"{one.strip()}. " for one in lines], hay).rstrip()

    def _turn(self, chain: list[str], value: str) -> Turn:
        return Turn(
            question=QUESTION.format(value=value),
            prefix=PREFIX.format(value=value, count=len(chain)),
            answer=f" {' '.join(chain)}",
            answers=tuple(chain),
            meta={"value": value, "hops": self.hops},
        )
