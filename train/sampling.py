"""Sampled compression: what a step trains under, from mild to hard."""

import dataclasses

from kvjax.compress.config import Compression
from kvjax.compress.presets import compression
from kvjax.eval.tasks import TRAIN, stream
from kvjax.train.config import Choice, SamplingConfig
from kvjax.train.data import draw


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """A compression, and what logs call it."""

    name: str
    compression: Compression


class Sampler:
    """Draws the compression of a step: a pure function of the seed and the step.

    Args:
        config: what is drawn from.
        seed: of the run.

    Raises:
        ValueError: a choice that is no compression, by its number.
    """

    def __init__(self, config: SamplingConfig, seed: int):
        self.config = config
        self.seed = seed
        self.samples: list[tuple[Sample, ...]] = []
        for number, choice in enumerate(config.choices):
            try:
                self.samples.append(samples(choice))
            except ValueError as wrong:
                raise ValueError(f"sampling.choices[{number}]: {wrong}") from None

    def at(self, step: int) -> Sample | None:
        """The compression of one step; None where nothing is compressed."""
        if not self.samples:
            return None
        rng = stream(TRAIN, "compression", self.seed, step)
        weights = {i: choice.weight for i, choice in enumerate(self.config.choices)}
        known = self.samples[draw(rng, weights)]
        share = min(1.0, (step + 1) / max(self.config.ramp, 1))
        joined = max(1, round(share * len(known)))
        return known[rng.randrange(joined)]


def samples(choice: Choice) -> tuple[Sample, ...]:
    """The compressions of a choice, one per `keep`."""
    made = compression(choice.compression, **choice.fields)
    if not choice.keeps:
        return (Sample(name=choice.compression, compression=made),)
    return tuple(
        Sample(
            name=f"{choice.compression}-keep{keep:g}", compression=made.with_keep(keep)
        )
        for keep in choice.keeps
    )
