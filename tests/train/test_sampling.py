"""Bits of a choice: drawn from mild to hard, crossed with budgets, refused early."""

import pytest
import yaml

import kvjax
from kvjax.config import decode
from kvjax.train.data.sampling import Sampler
from kvjax.train.held_out.cached import FULL, CachedEvaluation
from kvjax.train.recipe import (
    CachedConfig,
    CompressionChoice,
    SamplingConfig,
    load_config,
)
from kvjax.train.run import run
from kvjax.train.run.abstract import hardest
from kvjax.train.run.dry_run import dry_run
from tests.train import tiny_run
from tests.train.small import SHAPE, recipe

RAMP = 200
CODES = CompressionChoice(
    compression="kivi_2bit", bits=(4, 2), fields={"store.residual": 0}
)
BOTH = CompressionChoice(
    compression="snapkv_kivi",
    keeps=(0.5, 0.25, 0.125),
    bits=(8, 2),
    fields={"evict.score.window": 16, "store.residual": 0},
)


def sampler(*choices: CompressionChoice, ramp: int = RAMP, seed: int = 0) -> Sampler:
    return Sampler(SamplingConfig(choices=choices, ramp=ramp), seed)


def names(drawn: Sampler, first: int, last: int) -> list[str]:
    found = (drawn.at(step) for step in range(first, last))
    return [one.name for one in found if one is not None]


def test_bits_are_read_from_a_recipe():
    text = "{compression: kivi_2bit, bits: [4, 2], fields: {store.residual: 0}}"
    assert decode(yaml.safe_load(text), CompressionChoice) == CODES
    for wrong in ("4", "[four]", "[2.5]", "['4']"):
        with pytest.raises(ValueError, match="`bits"):
            decode(
                yaml.safe_load(f"{{compression: int8, bits: {wrong}}}"),
                CompressionChoice,
            )
    config = load_config("kv2bit")
    assert config.sampling.choices[1].bits == (4, 2) and config.sampling.ramp
    assert load_config("tolerant").sampling.choices[1].bits == ()


def test_bits_are_those_of_keys_and_values():
    mild, hard = sampler(CODES).samples[0]
    assert (mild.name, hard.name) == ("kivi_2bit-4bits", "kivi_2bit-2bits")
    for one, bits in ((mild, 4), (hard, 2)):
        fields = {"store.keys.bits": bits, "store.values.bits": bits}
        want = kvjax.compression("kivi_2bit", **CODES.fields, **fields)
        assert one.compression == want
    keys = CompressionChoice(
        compression="kivi_2bit", bits=(8,), fields={"store.values": "plain"}
    )
    one = sampler(keys).samples[0][0].compression
    fields = {"store.values": "plain", "store.keys.bits": 8}
    assert one == kvjax.compression("kivi_2bit", **fields)


def test_bits_join_from_mild_to_hard():
    drawn = sampler(CompressionChoice(compression="none"), CODES)
    assert set(names(drawn, 0, RAMP // 2)) == {"none", "kivi_2bit-4bits"}
    later = names(drawn, RAMP, 2000)
    assert set(later) == {"none", "kivi_2bit-4bits", "kivi_2bit-2bits"}
    assert 0.2 < later.count("kivi_2bit-2bits") / len(later) < 0.3
    at_once = names(sampler(CODES, ramp=0), 0, 20)
    assert set(at_once) == {"kivi_2bit-4bits", "kivi_2bit-2bits"}


def test_bits_are_crossed_with_budgets():
    drawn = sampler(BOTH)
    every = [
        f"snapkv_kivi-keep{keep:g}-{bits}bits"
        for keep in BOTH.keeps
        for bits in BOTH.bits
    ]
    assert [one.name for one in drawn.samples[0]] == every
    for one in drawn.samples[0]:
        _, keep, bits = one.name.split("-")
        assert one.compression.keep == float(keep.removeprefix("keep"))
        assert one.compression.store.keys.bits == int(bits[0])  # type: ignore
        assert one.compression.store.values.bits == int(bits[0])  # type: ignore
    # The second budget joins behind half of the ramp, the second bits behind 3/4 of it.
    assert set(names(drawn, 0, 80)) == {every[0]}
    assert set(names(drawn, 120, 140)) == {every[0], every[2]}
    later = names(drawn, RAMP, 2000)
    shares = [later.count(name) / len(later) for name in every]
    assert min(shares) > 0.13 and max(shares) < 0.2


def test_choices_without_bits_draw_what_they_did():
    """A run that goes on sees the compressions that it would have seen."""
    choices = (
        CompressionChoice(compression="none"),
        CompressionChoice(compression="knorm", keeps=(0.5, 0.25, 0.125), weight=3.0),
        CompressionChoice(compression="kivi_2bit"),
    )
    want = (
        "kivi_2bit kivi_2bit none knorm-keep0.5 knorm-keep0.5 knorm-keep0.25 "
        "knorm-keep0.25 knorm-keep0.25 knorm-keep0.5 none knorm-keep0.5 knorm-keep0.25 "
        "knorm-keep0.5 kivi_2bit knorm-keep0.125 none"
    )
    assert names(sampler(*choices, ramp=12, seed=5), 0, 16) == want.split()


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (
            CompressionChoice(compression="none", bits=(4,)),
            "has no codes .* Leave `bits` out",
        ),
        (
            CompressionChoice(compression="matryoshka", bits=(4,)),
            "are Projected and Projected",
        ),
        (
            CompressionChoice(compression="kivi_2bit", bits=(4, 3)),
            r"must be one of \[1, 2, 4, 8\]; got 3",
        ),
        (CompressionChoice(compression="int8", bits=(1,)), "`symmetric` needs a bit"),
        (
            CompressionChoice(
                compression="kivi_2bit", bits=(4,), fields={"store.keys.bits": 2}
            ),
            "sets store.keys.bits to 2",
        ),
        (
            CompressionChoice(
                compression="kivi_2bit",
                bits=(4,),
                fields={"store.values": {"type": "affine", "bits": 8}},
            ),
            "sets store.values.bits to 8",
        ),
    ],
    ids=["none", "projected", "unknown", "sign", "path", "mapping"],
)
def test_bits_that_cannot_be_are_refused(choice, said, tmp_path):
    for where in ("sampling", "cached"):
        config = {
            "sampling": tiny_run.recipe(sampling=SamplingConfig(choices=(choice,))),
            "cached": tiny_run.recipe(cached=CachedConfig(choices=(choice,))),
        }[where]
        message = rf"{where}\.choices\[0\]: .*{said}"
        with pytest.raises(ValueError, match=message):
            run(config, tmp_path / "run")
        with pytest.raises(ValueError, match=message):
            dry_run(config, "v5e", 1)
    assert not (tmp_path / "run").exists()


def test_the_hardest_of_a_choice_has_its_last_bits():
    config = recipe(sampling=SamplingConfig(choices=(CODES, BOTH)))
    wanted = ["kivi_2bit-2bits", "snapkv_kivi-keep0.125-2bits"]
    found = Sampler(hardest(config).sampling, 0).samples
    assert [one.name for choice in found for one in choice] == wanted
    evaluated = CachedEvaluation(
        recipe(sampling=config.sampling, cached=CachedConfig(items=0)), SHAPE
    )
    assert list(evaluated.compressions) == [FULL, *wanted]
