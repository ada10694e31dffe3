"""A fact known from training: the knowledge control, which needs no context."""

import dataclasses
import random
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, final

from kvjax.eval.tasks.base import Episode, Turn
from kvjax.eval.tasks.filler import sentences
from kvjax.eval.tasks.records import RecordTask, before_stop, too_short

_PAIRS = (
    "otter k,heron d,badger x,lynx p,newt u,stoat b,raven z,hare g,trout m,wasp e,"
    "moose t,gecko o,finch r,toad a,bison v,crane l,mole q,squid h,eel w,ibex c,"
    "panda n,koala s,tapir j,llama f,yak i,gnu y,quail g,snail t,robin m,shrew k,"
    "perch o,camel b,goose e,mouse x,tiger r,zebra u,whale d,shark a,swan p,vole z"
)
FACTS: Mapping[str, str] = MappingProxyType(
    {word: letter for word, letter in (pair.split() for pair in _PAIRS.split(","))}
)
"""The dictionary the model learns: one arbitrary letter per animal."""


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Fact(RecordTask):
    """Filler, then `[otter`; the reply is `=k]`, memorised in training.

    Attributes:
        leak: the question ends with `=`, so the first token of the answer is the
            letter itself and comes from the uncompressed prompt.
    """

    name: ClassVar[str] = "fact"

    leak: bool = False

    @property
    def max_new_tokens(self) -> int:
        """Sign, letter, stop."""
        return 3

    def episode(self, rng: random.Random, size: int, turns: int = 1) -> Episode:
        """See `Task.episode`."""
        turn_chars = 4 + max(map(len, FACTS)) + 3
        if turn_chars > size:
            raise too_short(self.name, size, turn_chars)
        turns = max(1, min(turns, len(FACTS), size // (2 * turn_chars)))
        sign = "=" if self.leak else ""
        asked = rng.sample(list(FACTS), turns)
        return Episode(
            context="".join(sentences(rng, size - turns * turn_chars, self.redundancy)),
            turns=tuple(
                Turn(
                    question=f"\n? [{word}{sign}",
                    answer=f"={FACTS[word]}]".removeprefix(sign),
                    meta={"word": word, "value": FACTS[word]},
                )
                for word in asked
            ),
        )

    def score(self, item: Turn, reply: str) -> float:
        """1 for the right letter."""
        return float(before_stop(reply).removeprefix("=") == item.meta["value"])
