"""The score that a model was trained to give its own tokens."""

import dataclasses
from typing import ClassVar, final

from kvjax.scorers.base import AbstractScorer, positive_int, protect_last


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Retention(AbstractScorer):
    """What the model's evictor says (`LayerInputs.retention`).

    Attributes:
        window: newest tokens that are always kept.

    Source: DMS (2506.05345), KVzap. Deviations: tokens are ranked for a budget, where
    both compare with a threshold; memory is then known before the data.
    """

    window: int = 16
    needs_retention: ClassVar[bool] = True

    def __post_init__(self):
        positive_int("window", self.window, 0)

    @property
    def protected(self):
        return self.window

    def observe(self, inputs, lengths, column_mass):
        del column_mass
        assert inputs.retention is not None  # checked before any compute
        return protect_last(inputs.retention, lengths, self.window)
