"""Gemma 3 text: alternating windows with their own RoPE, four norms, q/k norm."""

import math
from types import MappingProxyType
from typing import Any, final

from kvjax.fields import Factor, Positive, PositiveReal
from kvjax.messages import shown
from kvjax.models.config import DecoderConfig, Layers
from kvjax.models.families.base import ACTIVATION_NAMES, AbstractFamily, read_activation
from kvjax.models.families.rotary import read_rope, rope_settings
from kvjax.models.families.settings import Settings
from kvjax.models.families.windows import (
    FULL,
    SLIDING,
    one_window,
    read_layer_types,
    write_layer_types,
)
from kvjax.rope import Rope


@final
class Gemma3(AbstractFamily):
    """`Gemma3ForCausalLM`, the text model.

    `attn_logit_softcapping` is read by transformers and never applied; no published
    checkpoint sets it. We follow the numbers, and leave it out when saving.
    """

    model_type = "gemma3_text"
    architecture = "Gemma3ForCausalLM"
    defaults = MappingProxyType(
        {
            "head_dim": 256,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "pad_token_id": 0,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "max_position_embeddings": 131_072,
        }
    )
    reads = frozenset({"attn_logit_softcapping", "final_logit_softcapping"})
    theta = 1_000_000.0
    local_theta = 10_000.0
    linear_extends = False

    def extras(self, config: Settings) -> dict[str, Any]:
        """Norms, scales, caps and the window pattern."""
        bias = config.get("attention_bias", bool, False)
        layers = range(config.get("num_hidden_layers", Layers))
        every = config.get("sliding_window_pattern", Positive, 6)
        rule = [FULL if (index + 1) % every == 0 else SLIDING for index in layers]
        window = config.get("sliding_window", Positive, None)
        scalar = config.get("query_pre_attn_scalar", Factor)
        return {
            "activation": read_activation(
                config, "hidden_activation", "gelu_pytorch_tanh"
            ),
            "attention_scale": scalar**-0.5,
            "embedding_scale": math.sqrt(config.get("hidden_size", Positive)),
            "final_softcap": config.get("final_logit_softcapping", PositiveReal, None),
            "norm_offset": True,
            "o_bias": bias,
            "post_norms": True,
            "qk_norm": True,
            "qkv_bias": bias,
            "windows": read_layer_types(config, rule, window),
        }

    def read_ropes(self, config: Settings, head_dim: int) -> dict[str, Any]:
        """Full layers take the scaling; sliding layers have a base of their own."""
        settings = rope_settings(config)
        nested = SLIDING in settings or FULL in settings
        if nested:
            _check_nested(config, settings)
        wide = settings.inside(FULL) if nested else settings
        local = settings.inside(SLIDING) if nested else Settings({})
        theta = config.get("rope_theta", PositiveReal, self.theta)
        near = config.get("rope_local_base_freq", PositiveReal, self.local_theta)
        rope = read_rope(wide, config, head_dim=head_dim, theta=theta)
        local_rope = read_rope(local, config, head_dim=head_dim, theta=near)
        _check_local(local_rope)
        for one in (rope, local_rope):
            self.check_rotated(one)
        found = {"rope": rope, "local_rope": local_rope}
        return found | self.read_reach(rope, wide, config)

    def write_extras(self, config: DecoderConfig) -> dict[str, Any]:
        """Inverse of `extras` and `read_ropes`."""
        local = config.local_rope or config.rope
        _check_local(local)
        scale = config.attention_scale or config.head_dim**-0.5
        scalar, types = scale**-2, write_layer_types(config)
        whole = max(round(scalar), 1)
        return {
            "hidden_activation": ACTIVATION_NAMES[config.activation],
            "query_pre_attn_scalar": whole if whole**-0.5 == scale else scalar,
            "final_logit_softcapping": config.final_softcap,
            "attention_bias": config.qkv_bias,
            "rope_local_base_freq": local.theta,
            "sliding_window": one_window(config) or config.max_positions,
            "layer_types": types,
            "use_bidirectional_attention": False,
        }


def _check_nested(config: Settings, settings: Settings) -> None:
    """RoPE by kinds of layers: nothing beside them, no other base outside."""
    others = sorted({*settings.values} - {FULL, SLIDING})
    if others:
        raise ValueError(
            f"`{settings.where}` has {shown(others)} beside {FULL!r} and {SLIDING!r}. "
            "Put them into one of these."
        )
    for kind, name in ((FULL, "rope_theta"), (SLIDING, "rope_local_base_freq")):
        inner = settings.inside(kind).values.get("rope_theta")
        outer = config.values.get(name)
        if None not in (inner, outer) and inner != outer:
            raise ValueError(
                f"`{name}` is {shown(outer)}, and {shown(inner)} in "
                f"`{settings.where}.{kind}`. Keep one of them."
            )


def _check_local(rope: Rope) -> None:
    if rope.kind != "default":
        raise ValueError(
            "'gemma3_text' has no RoPE scaling on sliding layers, whose base alone is "
            f"stored (`rope_local_base_freq`); got {rope.kind!r} (`{SLIDING}`). Take "
            "it out there."
        )
