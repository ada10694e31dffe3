"""What a recipe says of compressions, in training and in its evaluation."""

import dataclasses
from typing import Any, Self

from kvjax.fields import Amount, Checked, Count, Kept, Positive, PositiveReal, Share


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionChoice(Checked):
    """One compression that training may draw.

    Attributes:
        compression: a preset or a YAML file.
        keeps: fractions to draw from, from mild to hard (`Compression.with_keep`:
            kept tokens, read tokens or rank); empty: the preset's own.
        bits: of a code, to draw from, from mild to hard (`Compression.with_bits`: of
            keys and values alike), with every one of `keeps`; empty: the preset's own.
        fields: dotted paths to values, as in `kvjax.compression`.
        weight: share of the steps.
    """

    compression: str
    keeps: tuple[Kept, ...] = ()
    bits: tuple[Positive, ...] = ()
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    weight: PositiveReal = 1.0

    @property
    def hardest(self) -> Self:
        """The same choice with its last budget and its last bits alone."""
        return dataclasses.replace(self, keeps=self.keeps[-1:], bits=self.bits[-1:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig(Checked):
    """Which compression a step trains under; every step draws one.

    Attributes:
        choices: what is drawn from; none: training without compression.
        ramp: steps over which the `keeps` and the `bits` of a choice join, each from
            mild to hard.
        visible: share of rows that are compressed behind their first question; the
            others are compressed between context and question.
        choice_gradient: temperature of a straight-through gradient for which tokens
            are kept, in standard deviations of their scores; 0 gives them none.
    """

    choices: tuple[CompressionChoice, ...] = ()
    ramp: Count = 0
    visible: Share = 0.5
    choice_gradient: Amount = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedConfig(Checked):
    """What goes through the real cache at every evaluation.

    Greedy replies to held-out items of tasks, and the next-token loss behind the
    compression point of held-out rows of datasets.

    Attributes:
        items: items in all, dealt to the tasks in turn, and as many rows, dealt to the
            datasets that have `held_out`; 0: none.
        choices: the compressions, beside none; empty: each choice of `sampling` at
            its hardest.
    """

    items: Count = 8
    choices: tuple[CompressionChoice, ...] = ()
