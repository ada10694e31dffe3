"""A step that was started, and what is said of one that went wrong."""

import dataclasses
import pathlib

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepProgress:
    """What the callback of a run is told behind each step.

    Attributes:
        step: how many are done.
        steps: of the run.
        loss: of the newest step that has surely finished; None at first.
    """

    step: int
    steps: int
    loss: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartedStep:
    """What a step was given, and what it says of itself.

    Attributes:
        number: of the step, from 1.
        width: tokens of its rows.
        rows: of its batch.
        compression: what it was trained under, as logs call it.
        metrics: scalars, perhaps not computed yet.
    """

    number: int
    width: int
    rows: int
    compression: str | None
    metrics: dict[str, jax.Array]

    @property
    def loss(self) -> float:
        """Of the batch; waits for it."""
        return float(self.metrics["loss"])

    @property
    def norm(self) -> float:
        """Of the gradient; waits for it."""
        return float(self.metrics["norm"])


def diverged(
    step: StartedStep, what: str, seed: int, saved: pathlib.Path | None
) -> ValueError:
    """A step whose numbers are not finite: which, under what, on which batch.

    Args:
        step: that was started.
        what: it gave.
        seed: of the run; with the number of the step it gives the batch.
        saved: the newest checkpoint.
    """
    kept = f"the last good state is {saved}" if saved else "no state was saved before"
    return ValueError(
        f"step {step.number} under compression {step.compression or 'none'} gave "
        f"{what}. Its batch, {step.rows} rows of {step.width} tokens, follows from "
        f"seed {seed} and the step: Mixture.batch({step.number - 1}) makes it again. "
        f"Nothing of the step was saved; {kept}. Lower optimizer.learning_rate or "
        "optimizer.clip, or look at that batch."
    )
