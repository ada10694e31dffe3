"""Chain arithmetic with written steps, modulo 10."""

import dataclasses
import random
import re
from typing import Annotated, ClassVar, final

from kvjax.eval.tasks.base import Episode, Turn
from kvjax.eval.tasks.filler import scatter, sentences
from kvjax.eval.tasks.records import RecordTask, before_stop, too_short
from kvjax.fields import Range

MAX_STEPS = 8
# Small operands, so that each part of a step already says something of its result:
# with all nine, no two of its three parts do, and a small model learns it last.
OPERATIONS = ("+1", "+2", "+3", "-1", "-2", "-3", "*2", "*3")
_QUESTION = "\n? [run "
_LAST_STEP = re.compile(r"(\d):[^;:]*=(\d);")


def apply(value: int, operation: str) -> int:
    """One step, modulo 10."""
    sign, operand = operation[0], int(operation[1:])
    results = {"+": value + operand, "-": value - operand, "*": value * operand}
    return results[sign] % 10


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain(RecordTask):
    """Steps `[0:7] [1:+3] [2:*2] [3:]` in filler; the reply works them off.

    The reply reads `0:7;1:+3 7+3=0;2:*2 0*2=0;3:]`: each step is looked up by its
    number, then computed from the result before it. Arithmetic is modulo 10.

    Attributes:
        steps: operations; None draws 1 to 8 per item.
    """

    name: ClassVar[str] = "chain"
    multi_turn: ClassVar[bool] = False

    steps: Annotated[int, Range(1, MAX_STEPS)] | None = None

    @property
    def max_new_tokens(self) -> int:
        """Start, steps, end."""
        return 4 + 11 * (self.steps or MAX_STEPS) + 3

    def episode(self, rng: random.Random, size: int, turns: int = 1) -> Episode:
        """See `Task.episode`."""
        del turns
        fixed = 6 + 5 + len(_QUESTION) + 4 + 3  # ends of the context and of the reply
        fit = (size - fixed) // (7 + 11)
        steps = self.steps or rng.randint(1, max(1, min(MAX_STEPS, fit)))
        if steps > fit:
            raise too_short(self.name, size, fixed + 18 * steps)
        value = rng.randrange(10)
        records, reply = [f"[0:{value}] "], f"0:{value};"
        for number in range(1, steps + 1):
            operation = rng.choice(OPERATIONS)
            result = apply(value, operation)
            records.append(f"[{number}:{operation}] ")
            reply += f"{number}:{operation} {value}{operation}={result};"
            value = result
        records.append(f"[{steps + 1}:] ")
        filler = sentences(rng, size - fixed - 18 * steps, self.redundancy)
        turn = Turn(
            question=_QUESTION,
            answer=f"{reply}{steps + 1}:]",
            meta={"steps": steps, "value": str(value)},
        )
        return Episode(context=scatter(rng, records, filler), turns=(turn,))

    def score(self, item: Turn, reply: str) -> float:
        """1 if the last step written is the last of the chain, with its result."""
        written = _LAST_STEP.findall(before_stop(reply))
        want = (str(item.meta["steps"]), item.meta["value"])
        return float(bool(written) and written[-1] == want)
