"""What a run leaves behind, checkpoints and numbers: parts of a recipe."""

import dataclasses
from typing import Annotated

from kvjax.fields import Checked, Count, OneOf, Positive

CACHED_LOSS = "cached_loss"
"""The metric that comes from the real cache."""

LOWER = ("loss", "answer_loss", CACHED_LOSS)
HIGHER = ("answer_accuracy", "exact")
TRACKERS = ("trackio", "wandb")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepConfig(Checked):
    """Which checkpoints stay on disk; the others go when a newer one is complete.

    Attributes:
        newest: that many of the newest.
        best: and that many of the best, wherever they are.
        metric: what best means. With a full cache, averaged over the held-out sets:
            `loss`, `answer_loss` (lower is better), `answer_accuracy`, `exact` (higher
            is). `cached_loss` (lower is better) is the loss through the real cache,
            averaged over the compressions of `cached` and the full cache; it needs a
            dataset with `held_out`. A later stage of the recipe beats an earlier one:
            its rows are others.
    """

    newest: Positive = 2
    best: Count = 1
    metric: Annotated[str, OneOf(*LOWER, *HIGHER)] = "answer_loss"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig(Checked):
    """Where numbers go beside the terminal and `log.jsonl`.

    Attributes:
        tensorboard: event files in `RUN/tensorboard`; needs tensorboardX.
        tracker: `trackio` or `wandb`, which must be installed; None: neither.
        project: what the tracker files the run under.
    """

    tensorboard: bool = False
    tracker: Annotated[str, OneOf(*TRACKERS)] | None = None
    project: str = "kvjax"
