"""The score that a model was trained to give its own tokens."""

import dataclasses
from typing import ClassVar, final

from kvjax.config import sized
from kvjax.fields import Count
from kvjax.scorers.base import AbstractScorer, protect_last


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Retention(AbstractScorer):
    """What the model's evictor says (`LayerInputs.retention`).

    Attributes:
        window: newest tokens that are always kept.

    Source: DMS (2506.05345), KVzap. Deviations: tokens are ranked for a budget, where
    both compare with a threshold; memory is then known before the data.
    """

    window: Count = sized(16, short=8, recent=True)
    needs_retention: ClassVar[bool] = True

    @property
    def protected(self):
        return self.window

    def tokens(self, asked):
        assert asked.retention is not None  # checked before any compute
        return asked.retention

    def score(self, memory, held, counts):
        del counts
        return protect_last(memory.slots, held, self.window)
