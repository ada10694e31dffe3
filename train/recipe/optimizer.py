"""What a recipe says of its optimizer."""

import dataclasses
from typing import Annotated

from kvjax.fields import Amount, Checked, Count, OneOf, Positive, PositiveReal, Range

Moment = Annotated[float, Range(0, below=1)]
SCHEDULES = ("linear", "cosine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Checked):
    """Optimizer and schedule: warm-up, constant, decay to zero.

    Attributes:
        name: `muon` (matrices; AdamW for the rest) or `adamw`.
        learning_rate: of the constant part. Muon's updates are scaled to the size of
            AdamW's, so one rate serves both.
        warmup, decay: steps at the beginning and at the end.
        schedule: shape of the decay, `linear` or `cosine` (half a period).
        weight_decay: decoupled.
        beta1, beta2: moments of AdamW.
        clip: bound on the global gradient norm.
        accumulate: batches per update, whose gradients are averaged.
    """

    name: str = "muon"
    learning_rate: PositiveReal = 2e-3
    warmup: Count = 50
    decay: Count = 300
    schedule: Annotated[str, OneOf(*SCHEDULES)] = "linear"
    weight_decay: Amount = 0.01
    beta1: Moment = 0.9
    beta2: Moment = 0.98
    clip: PositiveReal = 1.0
    accumulate: Positive = 1
