"""Tasks of records in brackets, which a small character model can do.

Every record is written as `[KQ=ab3d]`, so one stop character serves all of them, and
records can be found by eye and by delimiter-based methods.
"""

import dataclasses
from collections.abc import Callable
from random import Random
from typing import ClassVar

from kvjax.eval.tasks.base import Episode, Measure, Task, characters
from kvjax.fields import Share

STOP = "]"
"""Last character of every answer; never part of a value."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordTask(Task):
    """A task whose size is characters of context, questions and answers.

    An answer ends with the stop and has at least two characters, so at least one of
    them is decoded from the compressed cache.

    Attributes:
        redundancy: share of filler sentences taken from a handful of stock phrases,
            in [0, 1]; the rest is drawn word by word.
    """

    unit: ClassVar[str] = "characters"
    chat: ClassVar[bool] = False
    stop: ClassVar[str] = STOP

    redundancy: Share = 0.5

    def smallest(self, length: int) -> int:
        """A token has one character or more."""
        return length

    def fitted(
        self,
        draw: Callable[[], Random],
        length: int,
        measure: Measure | None = None,
        turns: int = 1,
    ) -> Episode:
        """See `Task.fitted`; sizes are lengths in characters."""
        whole = self.episode(draw(), length, turns)
        if measure is None or measure(whole) == characters(whole):
            return whole  # a token is a character
        return super().fitted(draw, length, measure, turns)


def before_stop(reply: str) -> str:
    """The reply up to its first stop character."""
    return reply.split(STOP, 1)[0]


def too_short(task: str, length: int, need: int) -> ValueError:
    """The error of a length that cannot hold the smallest item."""
    return ValueError(
        f"Task {task!r} does not fit into {length} characters: it needs {need}. "
        "Raise the length, or ask it for less (`fields`)."
    )
