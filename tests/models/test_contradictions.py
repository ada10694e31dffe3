"""`config.json` files that say two things, or half of one: refused by name."""

import pytest

from kvjax.models.families import FAMILIES, read_config
from tests.models.test_families import GEMMA, LLAMA

THREE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0}
LONGROPE = {"short_factor": [1.0] * 2, "long_factor": [2.0] * 2}
YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("given", "match"),
    [
        (THREE, "'high_freq_factor'.* and no `rope_type`"),
        (LONGROPE, "'long_factor'.* and no `rope_type`"),
        ({"beta_fast": 32, "rope_theta": 1e4}, r"\['beta_fast'\] and no `rope_type`"),
        ({"factor": 2.0, "type": None}, r"\['factor'\] and no `rope_type`"),
        ({"full_attention": YARN}, r"\['full_attention'\] and no `rope_type`"),
        (False, "must be a mapping; got False"),
        ([], r"must be a mapping; got \[\]"),
        (0, "must be a mapping; got 0"),
        ("", "must be a mapping; got ''"),
        (YARN | {"type": "linear"}, "`rope_type` 'yarn' and `type` 'linear'"),
        (YARN | {"type": "default"}, "`rope_type` 'yarn' and `type` 'default'"),
        (YARN | {"type": "su"}, "`rope_type` 'yarn' and `type` 'su'"),
        (YARN | {"rope_theta": 5e5}, "`rope_theta` is 10000.0, and 500000.0 in"),
    ],
)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_ropes_that_contradict_themselves(family, name, given, match):
    nested = family == "gemma3_text" and isinstance(given, dict)
    if nested and "full_attention" in given:
        given, match = given | THREE, "'factor'.* beside 'full_attention'"
    config = LLAMA | {"model_type": family, "rope_theta": 1e4, "sliding_window": 8}
    with pytest.raises(ValueError, match=f"`{name}`.*{match}|{match}.*`{name}`"):
        read_config(config | {name: given})


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        (YARN, {"rope_type": "linear", "factor": 4.0}, False),
        (YARN, {"rope_type": "default", "rope_theta": 1e4}, False),
        (YARN, YARN | {"factor": 2.0}, False),
        (YARN, {"type": "yarn", "factor": 4, "rope_theta": 5e5}, True),
        (YARN, {"rope_theta": 5e5}, True),
        (YARN, {}, True),
        (YARN, None, True),
        (None, YARN | {"type": "yarn", "rope_theta": 5e5}, True),
        ({}, {"rope_theta": 5e5}, True),
    ],
)
def test_both_spellings_at_once(old, new, same):
    given = LLAMA | {"rope_scaling": old, "rope_parameters": new}
    if not same:
        with pytest.raises(ValueError, match="contradict each other. Keep one"):
            read_config(given)
        return
    rope = read_config(given).rope
    assert rope.kind == ("yarn" if old or len(new) > 1 else "default")
    assert rope.theta == (new or {}).get("rope_theta", 1e4)


def test_the_default_outside_is_no_contradiction():
    """transformers writes it beside what the mapping says."""
    inner = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    given = LLAMA | {"model_type": "phi3", "rope_parameters": inner}
    assert read_config(given | {"partial_rotary_factor": 1.0}).rope.width == 2
    with pytest.raises(ValueError, match="`partial_rotary_factor` is 0.25, and 0.5"):
        read_config(given | {"partial_rotary_factor": 0.25})


ALIKE = [
    (["x"] * 2, None, "Layer types \\['x'\\] are not supported"),
    (["sliding_attention"] * 2, None, "`sliding_window` is off"),
    (["full_attention"] * 7, None, "got 7 for 2 layers"),
    ("full_attention", None, "`layer_types` must be"),
    (["full_attention"] * 2, None, ""),
]
WINDOWED = [
    (["full_attention"] * 2, 8, "are 'sliding_attention' by `sliding_window`"),
    (["sliding_attention"] * 2, 8, ""),
    (None, 8, ""),
]


@pytest.mark.parametrize(
    ("family", "types", "window", "match"),
    [("llama", *case) for case in ALIKE]
    + [(name, *case) for name in ("mistral", "phi3") for case in ALIKE + WINDOWED],
)
def test_layer_types_where_all_are_alike(family, types, window, match):
    given = {"model_type": family, "layer_types": types, "sliding_window": window}
    if match:
        with pytest.raises(ValueError, match=match):
            read_config(LLAMA | given)
    else:
        assert {layer.window for layer in read_config(LLAMA | given).layers} == {window}


def test_a_null_is_not_called_missing():
    with pytest.raises(
        ValueError, match="`query_pre_.*, which is missing: it is null"
    ) as no:
        read_config(GEMMA | {"query_pre_attn_scalar": None})
    assert "Did you mean" not in str(no.value)
    with pytest.raises(ValueError, match="needs `hidden_size`, which is missing"):
        read_config({name: LLAMA[name] for name in LLAMA if name != "hidden_size"})
