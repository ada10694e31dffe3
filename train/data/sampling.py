"""Sampled compression: what a step trains under, from mild to hard."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvjax.compress.config import Compression
from kvjax.compress.presets import compression
from kvjax.config import override
from kvjax.eval.tasks import TRAIN, stream
from kvjax.train.data.mixture import draw
from kvjax.train.recipe import CompressionChoice, SamplingConfig, TrainConfig


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
        self.samples = samples_of(config.choices, "sampling.choices")

    def at(self, step: int) -> Sample | None:
        """The compression of one step; None where nothing is compressed."""
        if not self.samples:
            return None
        rng = stream(TRAIN, "compression", self.seed, step)
        weights = {i: choice.weight for i, choice in enumerate(self.config.choices)}
        number = draw(rng, weights)
        choice = self.config.choices[number]
        share = min(1.0, (step + 1) / max(self.config.ramp, 1))
        keeps, bits = (_joined(x, share) for x in (choice.keeps, choice.bits))
        # One draw for both, so that a choice without `bits` draws what it always did.
        keep, bit = divmod(rng.randrange(keeps * bits), bits)
        return self.samples[number][keep * max(len(choice.bits), 1) + bit]


def _joined(values: Sequence[float], share: float) -> int:
    """How many of `values` may be drawn; without any there is the preset's own."""
    return max(1, round(share * len(values)))


def check_choices(config: TrainConfig) -> None:
    """Every compression of a recipe can be made, or a `ValueError` says which not."""
    samples_of(config.sampling.choices, "sampling.choices")
    samples_of(config.cached.choices, "cached.choices")


def samples_of(
    choices: Sequence[CompressionChoice], where: str
) -> list[tuple[Sample, ...]]:
    """The compressions of each choice.

    Raises:
        ValueError: a choice that is no compression, by its number in `where`.
    """
    made = []
    for number, choice in enumerate(choices):
        try:
            made.append(tuple(_samples(choice)))
        except ValueError as wrong:
            raise ValueError(f"{where}[{number}]: {wrong}") from None
    return made


def _samples(choice: CompressionChoice) -> Iterator[Sample]:
    """One per `keep` and, for each of these, one per number of bits."""
    base = compression(choice.compression, **choice.fields)
    if choice.bits:
        _check_free(choice.fields)
    for keep in choice.keeps or (None,):
        for bits in choice.bits or (None,):
            name, made = choice.compression, base
            if keep is not None:
                name, made = f"{name}-keep{keep:g}", made.with_keep(keep)
            if bits is not None:
                name, made = f"{name}-{bits}bits", made.with_bits(bits)
            yield Sample(name=name, compression=made)


def _check_free(fields: Mapping[str, Any]) -> None:
    """Nothing in `fields` says how many bits codes have."""
    store = override({}, fields).get("store") or {}
    for side in ("keys", "values"):
        codec = store.get(side)
        if isinstance(codec, Mapping) and "bits" in codec:
            raise ValueError(
                f"`fields` sets store.{side}.bits to {codec['bits']!r}, and `bits` "
                "lists what is drawn. Say it in one of them."
            )
