"""Scaled RoPE: angles by transformers' formulas, ranges, both ways, what is refused."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.models.families import FAMILIES, read_config
from kvjax.rope import Rope

CONFIG = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
SHORT = [1.0, 1.05, 1.1, 1.5, 2.0, 2.5, 3.0, 3]
LONG = [1.0, 1.5, 2.25, 4.0, 8.0, 16.0, 30.5, 64]
YARN = {"type": "yarn", "factor": 4.0}
LLAMA3 = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
PHI = {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}
TRAINED = "original_max_position_embeddings"


def config_of(scaling, family: str = "llama", **settings):
    return read_config(
        CONFIG | {"model_type": family, "rope_scaling": scaling} | settings
    )


def again(config):
    written = FAMILIES[config.family].write(config, "float32")
    return read_config(json.loads(json.dumps(written)))


@pytest.mark.parametrize("width", [16, 12])
@pytest.mark.parametrize("limit", [256, 257, 4096])
def test_longrope(width, limit):
    """Divisors of the side on which the model's range lies, and its magnitude."""
    given = PHI | {name: PHI[name][: width // 2] for name in list(PHI)[1:]}
    config = config_of(
        given,
        "phi3",
        max_position_embeddings=limit,
        partial_rotary_factor=width / 16,
        rope_theta=1e4,
        **{TRAINED: 256},
    )
    half = np.arange(0, width, 2) / width
    divisors = given["long_factor" if limit > 256 else "short_factor"]
    np.testing.assert_allclose(
        config.rope.frequencies(), 1 / (np.array(divisors) * 1e4**half), rtol=1e-6
    )
    ratio = limit / 256
    scale = math.sqrt(1 + math.log(ratio) / math.log(256)) if ratio > 1 else 1.0
    assert config.rope.magnitude == pytest.approx(scale)
    assert config.max_positions == limit and again(config) == config
    x = np.random.default_rng(0).normal(size=(3, 16)).astype("f4")
    there = jax.jit(config.rope.rotate)(x, jnp.arange(3))
    angle = np.arange(3)[:, None] / (np.array(divisors) * 1e4**half)
    first, second = x[:, : width // 2], x[:, width // 2 : width]
    turned = [
        first * np.cos(angle) - second * np.sin(angle),
        second * np.cos(angle) + first * np.sin(angle),
    ]
    wanted = np.concatenate([*(scale * part for part in turned), x[:, width:]], 1)
    np.testing.assert_allclose(there, wanted, atol=1e-5)
    back = jax.jit(config.rope.unrotate)(there, jnp.arange(3))
    np.testing.assert_allclose(back, x, atol=1e-5)


def test_longrope_spellings():
    """The range, a factor, and a magnitude may each stand in the file."""
    old = config_of(PHI | {"type": "su"}, "phi3", **{TRAINED: 256})
    assert old == config_of(PHI | {"type": "yarn"}, "phi3", **{TRAINED: 256})
    assert old == config_of(PHI, "phi3", **{TRAINED: 256})
    other = config_of(PHI | {TRAINED: 256}, "llama")
    assert other.rope == old.rope and again(other) == other
    # Short divisors with the magnitude of the long model: a bounded context.
    short = config_of(
        PHI | {"factor": 32.0}, "phi3", max_position_embeddings=256, **{TRAINED: 256}
    )
    assert short.rope.magnitude == pytest.approx(math.sqrt(1 + 5 / 8))
    assert short.rope.frequencies()[-1] == pytest.approx(1e4 ** -(14 / 16) / 3)
    given = config_of(PHI | {"attention_factor": 1.25}, "phi3", **{TRAINED: 256})
    assert given.rope.magnitude == 1.25
    assert again(short) == short and again(given) == given
    stored = FAMILIES["phi3"].write(old, "float32")
    assert stored[TRAINED] == 256 and stored["rope_scaling"]["type"] == "longrope"


def test_dynamic():
    """The base for the whole range; there, transformers has it for every sequence."""
    config = config_of({"type": "dynamic", "factor": 2.0}, rope_theta=1e4)
    assert config.max_positions == 1024 and again(config) == config
    base = 1e4 * ((2.0 * 1024 / 512) - (2.0 - 1)) ** (16 / 14)
    wanted = 1 / base ** (np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(config.rope.frequencies(), wanted, rtol=1e-6)
    assert config.rope.magnitude == 1
    plain = config_of({"type": "dynamic", "factor": 1.0})
    np.testing.assert_array_equal(
        plain.rope.frequencies(), Rope(head_dim=16).frequencies()
    )


@pytest.mark.parametrize(
    ("scaling", "family", "limit", "range_"),
    [
        ({"type": "linear", "factor": 8}, "llama", 512, 4096),
        ({"type": "linear", "factor": 2.7}, "qwen2", 512, 1382),
        ({"type": "linear", "factor": 8, TRAINED: 64}, "llama", 512, 512),
        ({"type": "linear", "factor": 8, TRAINED: 512}, "llama", 512, 4096),
        ({"type": "linear", "factor": 8}, "gemma3_text", 512, 512),
        ({"type": "dynamic", "factor": 2.3}, "llama", 512, 1177),
        ({"type": "dynamic", "factor": 3.0, TRAINED: 128}, "llama", 512, 512),
        (YARN, "qwen2", 512, 2048),
        (YARN | {TRAINED: 512}, "qwen2", 512, 2048),
        (YARN | {TRAINED: 512}, "qwen3", 640, 2048),
        (YARN | {TRAINED: 128}, "llama", 512, 512),
        (YARN | {TRAINED: 64}, "llama", 512, 512),
        (YARN | {TRAINED: 512}, "gemma3_text", 512, 2048),
        (LLAMA3 | {TRAINED: 512}, "llama", 512, 4096),
        (LLAMA3 | {TRAINED: 256}, "llama", 512, 512),
        (LLAMA3 | {TRAINED: 16}, "llama", 512, 512),
    ],
)
def test_a_scaling_extends_the_range_it_was_added_to(scaling, family, limit, range_):
    config = config_of(scaling, family, max_position_embeddings=limit, head_dim=16)
    assert config.max_positions == range_
    assert again(config) == config


@pytest.mark.parametrize(
    ("scaling", "match"),
    [
        (PHI | {"short_factor": SHORT[:-1]}, r"8 numbers in `short_factor`.*got 7"),
        (PHI | {"long_factor": [*LONG, 1.0]}, r"8 numbers in `long_factor`.*got 9"),
        (
            PHI | {"long_factor": [0.0, *LONG[1:]]},
            "factor.0` must be a number > 0",
        ),
        (
            PHI | {"long_factor": [-1.0, *LONG[1:]]},
            "factor.0` .* > 0; got -1.0",
        ),
        (
            PHI | {"long_factor": [math.nan, *LONG[1:]]},
            "factor.0` must be a finite",
        ),
        (PHI | {"long_factor": ["1", *LONG[1:]]}, "long_factor.0` must be a number"),
        (PHI | {"long_factor": 3.0}, "long_factor` must be a list"),
        (PHI | {"long_factor": None}, "needs `long_factor`"),
        (PHI | {"attention_factor": 0}, "attention_factor` must be a number > 0"),
        (PHI | {"beta_fast": 32}, "does not support.*beta_fast"),
        (PHI | {TRAINED: 1}, "original_max_positions` must be an integer >= 2"),
        (PHI | {TRAINED: 2.5}, f"{TRAINED}` must be an integer >= 1"),
        ({"type": "dynamic"}, "needs `factor`"),
        ({"type": "dynamic", "factor": 0.5}, "`factor` of at least 1; got .*0.5"),
        ({"type": "dynamic", "factor": -2}, ".factor` must be a number > 0"),
        ({"type": "dynamic", "factor": "2"}, ".factor` must be a number"),
        ({"type": "linear", "factor": math.inf}, ".factor` must be a finite"),
        ({"type": "linear", "factor": 10**400}, ".factor` must be a"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "`high_freq_factor` above"),
        (YARN | {"beta_slow": -1}, ".beta_slow` must be a number > 0"),
        (YARN | {"rope_theta": [1]}, ".rope_theta` must be a number"),
    ],
)
def test_scalings_that_cannot_be_are_refused(scaling, match):
    with pytest.raises(ValueError, match=match):
        config_of(scaling)


def test_records_made_in_python():
    rope = Rope(
        head_dim=4,
        kind="longrope",
        original_max_positions=8,
        reach=8,
        short_factor=[1.0, 1],  # type: ignore[arg-type]
        long_factor=(1.0, 1.0),
    )
    assert rope.short_factor == rope.long_factor and hash(rope)
    with pytest.raises(ValueError, match="'dynamic' needs `reach`"):
        Rope(head_dim=4, kind="dynamic", original_max_positions=8)
    with pytest.raises(ValueError, match="at least 4 rotated channels"):
        Rope(head_dim=2, kind="dynamic", original_max_positions=8, reach=8)
