"""Multi-key recall: which value was written beside this key?"""

import dataclasses
import random
import string
from typing import Annotated, ClassVar, final

from kvjax.eval.tasks.base import Episode, Turn
from kvjax.eval.tasks.filler import scatter, sentences
from kvjax.eval.tasks.records import RecordTask, before_stop, too_short
from kvjax.fields import Fraction, Range, Share

VALUE_LENGTHS = (1, 4, 16)
_SYMBOLS = string.ascii_lowercase + string.digits
_OPEN = "\n? ["
MAX_KEYS = 100


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall(RecordTask):
    """Records `[47:ab3d]` in filler; the question asks the value of one key.

    The question ends before the colon, so the first token of an answer, which comes
    from the uncompressed prompt, is known anyway and the whole value is decoded from
    the compressed cache.

    Attributes:
        value_length: characters of a value; None draws 1, 4 or 16 per item.
        keys: records per context; None lets records take `density` of the context.
        density: share of the context taken by records when `keys` is None.
        depth: place of the asked record as a fraction of the context (0 is its
            start), or None for anywhere: the needle test.
        leak: the question ends with the colon: its last token has to find the record
            already, which query-aware scores can see, and the first character of the
            value comes from the uncompressed prompt.
    """

    name: ClassVar[str] = "recall"

    value_length: Annotated[int, Range(1, 4096)] | None = None
    keys: Annotated[int, Range(1, MAX_KEYS)] | None = None
    density: Fraction = 0.3
    depth: Share | None = None
    leak: bool = False

    @property
    def max_new_tokens(self) -> int:
        """Colon, value, stop."""
        return (self.value_length or max(VALUE_LENGTHS)) + 2

    def episode(self, rng: random.Random, size: int, turns: int = 1) -> Episode:
        """See `Task.episode`."""
        width = self.value_length or rng.choice(VALUE_LENGTHS)
        record_chars = 2 + 1 + width + 3  # "[47:value] "
        turn_chars = len(_OPEN) + 2 + 1 + width + 1
        turns = max(1, min(turns, size // (2 * turn_chars)))
        budget = size - turns * turn_chars
        keys = self.keys or max(1, int(self.density * budget / record_chars))
        keys = min(keys, MAX_KEYS)
        if keys * record_chars > budget:
            raise too_short(self.name, size, turns * turn_chars + keys * record_chars)
        names = [f"{name:02d}" for name in rng.sample(range(MAX_KEYS), keys)]
        values = ["".join(rng.choices(_SYMBOLS, k=width)) for _ in names]
        pairs = list(zip(names, values, strict=True))
        asked = rng.sample(range(keys), min(turns, keys))
        depths: list[float | None] = [None] * keys
        depths[asked[0]] = self.depth
        filler = sentences(rng, budget - keys * record_chars, self.redundancy)
        records = [f"[{key}:{value}] " for key, value in pairs]
        return Episode(
            context=scatter(rng, records, filler, depths),
            turns=tuple(self._turn(*pairs[index], keys) for index in asked),
        )

    def score(self, item: Turn, reply: str) -> float:
        """1 for the exact value."""
        return float(before_stop(reply).removeprefix(":") == item.meta["value"])

    def _turn(self, key: str, value: str, keys: int) -> Turn:
        meta = {"key": key, "value": value, "keys": keys, "depth": self.depth}
        answer = f":{value}]"
        if self.leak:
            return Turn(question=f"{_OPEN}{key}:", answer=answer[1:], meta=meta)
        return Turn(question=_OPEN + key, answer=answer, meta=meta)
