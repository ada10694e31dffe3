"""`config.json` and tensor names, both ways, and what is refused."""

import pytest

from kvjax.models.families import FAMILIES, read_config
from kvjax.models.families.base import AbstractFamily
from kvjax.rope import Rope

from .samples import CONFIGS

LLAMA = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GEMMA = LLAMA | {"model_type": "gemma3_text", "head_dim": 4, "sliding_window": 8}
QWEN = LLAMA | {"model_type": "qwen2", "sliding_window": 8, "num_hidden_layers": 4}


def test_registry_is_complete_and_immutable():
    assert set(FAMILIES) == set(CONFIGS)
    for name, family in FAMILIES.items():
        assert isinstance(family, AbstractFamily)
        assert family.model_type == name
    with pytest.raises(TypeError):
        FAMILIES["other"] = FAMILIES["llama"]  # type: ignore[index]


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_config_round_trips(family):
    config = CONFIGS[family]
    assert read_config(FAMILIES[family].write(config, "float32")) == config


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_weights_cover_each_parameter_once(family):
    weights = FAMILIES[family].weights(CONFIGS[family])
    paths = [
        (weight.layer, path) for weight in weights.values() for path in weight.paths
    ]
    assert len(paths) == len(set(paths))


def test_phi3_fuses_projections():
    names = FAMILIES["phi3"].weights(CONFIGS["phi3"])
    qkv = names["model.layers.0.self_attn.qkv_proj.weight"]
    assert [path.split(".")[-2] for path in qkv.paths] == ["q", "k", "v"]
    assert "model.layers.0.mlp.gate_up_proj.weight" in names
    assert not [name for name in names if "q_proj" in name or "up_proj.b" in name]


@pytest.mark.parametrize(
    ("settings", "rope"),
    [
        ({}, Rope(head_dim=4)),
        ({"rope_theta": 5e5}, Rope(head_dim=4, theta=5e5)),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            Rope(head_dim=4, kind="linear", factor=2.0),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2}},
            Rope(head_dim=4, theta=5e5, kind="linear", factor=2.0),
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "linear",
                    "factor": 2.0,
                    "rope_theta": 5e5,
                }
            },
            Rope(head_dim=4, theta=5e5, kind="linear", factor=2.0),
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                    "mscale": 1.0,
                    "mscale_all_dim": 1.0,
                }
            },
            Rope(
                head_dim=4,
                kind="yarn",
                factor=4.0,
                original_max_positions=16,
                attention_factor=1.0,
            ),
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "original_max_position_embeddings": 16,
                }
            },
            Rope(head_dim=4, kind="yarn", factor=4.0, original_max_positions=16),
        ),
    ],
)
def test_rope_spellings(settings, rope):
    assert read_config(LLAMA | settings).rope == rope


@pytest.mark.parametrize(
    "scalar", [1e-3, 1 / 3, 0.9999995, 3.0000001, 168, 256.0, 999_999.5, 1e6]
)
def test_gemma_scales_are_stored_as_they_are(scalar):
    config = read_config(GEMMA | {"query_pre_attn_scalar": scalar})
    again = read_config(FAMILIES["gemma3_text"].write(config, "float32"))
    assert again.attention_scale == config.attention_scale == scalar**-0.5


@pytest.mark.parametrize("scalar", [1e-20, 0, -1, 9e-4, 2e6, "256"])
def test_gemma_scales_out_of_range(scalar):
    with pytest.raises(
        ValueError, match=r"`query_pre_attn_scalar` .* \[0.001, 1000000"
    ):
        read_config(GEMMA | {"query_pre_attn_scalar": scalar})


@pytest.mark.parametrize(
    ("kind", "extra", "match"),
    [
        ("sliding_attention", {"factor": 8.0}, "no RoPE scaling on sliding layers"),
        ("sliding_attention", {"partial_rotary_factor": 0.5}, "partial rotation of 2"),
        ("full_attention", {"partial_rotary_factor": 0.5}, "partial rotation of 2"),
    ],
)
def test_gemma_ropes_that_cannot_be_stored(kind, extra, match):
    rope = {"rope_type": "linear" if "factor" in extra else "default"} | extra
    with pytest.raises(ValueError, match=match):
        read_config(GEMMA | {"rope_parameters": {kind: rope}})


def test_gemma_rope_spellings_agree():
    old = {
        "rope_theta": 1e6,
        "rope_local_base_freq": 5e3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 2,
    }
    new = {
        "rope_parameters": {
            "full_attention": {
                "rope_type": "linear",
                "factor": 8.0,
                "rope_theta": 1e6,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
        },
        "layer_types": ["sliding_attention", "full_attention"],
    }
    config = read_config(GEMMA | old)
    assert config == read_config(GEMMA | new)
    local, full = config.layers
    assert (local.window, local.rope) == (8, Rope(head_dim=4, theta=5e3))
    assert full.window is None and full.rope.kind == "linear"
    assert config.tie_embeddings and config.embedding_scale == 4.0


@pytest.mark.parametrize(
    ("settings", "windows"),
    [
        ({}, ()),
        ({"use_sliding_window": True}, ()),
        ({"use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 8)),
        (
            {
                "use_sliding_window": True,
                "layer_types": ["sliding_attention"] + ["full_attention"] * 3,
            },
            (8, None, None, None),
        ),
        ({"use_sliding_window": False, "max_window_layers": 0}, ()),
    ],
)
def test_qwen_windows(settings, windows):
    assert read_config(QWEN | settings).windows == windows


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"model_type": "lama"}, "lama.*Did you mean 'llama'"),
        ({"model_type": "mixtral"}, "mixtral.*expected.*mistral"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 2}},
            "needs `short_factor`",
        ),
        ({"rope_scaling": {"type": "dynamics", "factor": 2}}, "Did you mean 'dynamic'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "mrope"),
        ({"rope_scaling": {"type": "linear"}}, "needs `factor`"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta": 1}}, "beta"),
        ({"rope_scaling": {"type": "default", "mrope_section": [1]}}, "mrope_section"),
        ({"rope_scaling": {"type": "llama3", "factor": 2}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "rotates all channels"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"hidden_act": "silo"}, "silo.*Did you mean 'silu'"),
        ({"num_key_value_heads": 3}, "must divide `num_heads`"),
        ({"num_attention_heads": 3}, "must divide `hidden_size`"),
        ({"hidden_size": None}, "needs `hidden_size`"),
        ({"num_hidden_layers": "2"}, "`num_hidden_layers` must be an integer"),
        ({"vocab_size": True}, "`vocab_size` must be an integer"),
    ],
)
def test_unsupported_settings_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        read_config(LLAMA | settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (GEMMA | {"use_bidirectional_attention": True}, "bidirectional"),
        (GEMMA | {"layer_types": ["linear_attention"] * 2}, "linear_attention"),
        (QWEN | {"layer_types": ["sliding_attention"] * 4}, "sliding_window` is off"),
        (QWEN | {"layer_types": ["full_attention"]}, "per layer"),
        (
            LLAMA
            | {"model_type": "mistral"}
            | {"layer_types": ["sliding_attention", "full_attention"]},
            "one window",
        ),
        (
            LLAMA
            | {"model_type": "phi3"}
            | {"rope_scaling": {"type": "yarn", "factor": 2}},
            "phi3",
        ),
        (LLAMA | {"model_type": "phi3", "head_dim": 8}, "head_dim"),
        ({"hidden_size": 16}, "needs `model_type`"),
    ],
)
def test_unsupported_settings_of_a_family_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        read_config(settings)
