"""What a recipe says of its optimizer."""

import dataclasses

from kvjax.types import nearest

SCHEDULES = ("linear", "cosine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
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
    learning_rate: float = 2e-3
    warmup: int = 50
    decay: int = 300
    schedule: str = "linear"
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0
    accumulate: int = 1

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"Unknown `optimizer.schedule` {self.schedule!r}; expected one of "
                f"{list(SCHEDULES)}.{nearest(self.schedule, SCHEDULES)}"
            )
