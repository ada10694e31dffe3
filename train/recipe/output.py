"""What a run leaves behind, checkpoints and numbers: parts of a recipe."""

import dataclasses

from kvjax.types import nearest

CACHED_LOSS = "cached_loss"
"""The metric that comes from the real cache."""

LOWER = ("loss", "answer_loss", CACHED_LOSS)
HIGHER = ("answer_accuracy", "exact")
TRACKERS = ("trackio", "wandb")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepConfig:
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

    newest: int = 2
    best: int = 1
    metric: str = "answer_loss"

    def __post_init__(self):
        if self.newest < 1 or self.best < 0:
            raise ValueError(
                "`keep.newest` must be at least 1 and `keep.best` at least 0; got "
                f"{self.newest} and {self.best}."
            )
        if self.metric not in LOWER + HIGHER:
            raise ValueError(
                f"Unknown `keep.metric` {self.metric!r}; expected one of "
                f"{[*LOWER, *HIGHER]}.{nearest(self.metric, LOWER + HIGHER)}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where numbers go beside the terminal and `log.jsonl`.

    Attributes:
        tensorboard: event files in `RUN/tensorboard`; needs tensorboardX.
        tracker: `trackio` or `wandb`, which must be installed; None: neither.
        project: what the tracker files the run under.
    """

    tensorboard: bool = False
    tracker: str | None = None
    project: str = "kvjax"

    def __post_init__(self):
        if self.tracker is not None and self.tracker not in TRACKERS:
            raise ValueError(
                f"Unknown `log.tracker` {self.tracker!r}; expected one of "
                f"{list(TRACKERS)}.{nearest(self.tracker, TRACKERS)}"
            )
