"""Phi-3 and Phi-4-mini: fused projections in the checkpoint, partial rotation."""

from types import MappingProxyType
from typing import Any, NoReturn, final

from kvjax.fields import Positive
from kvjax.models.config import DecoderConfig
from kvjax.models.families.base import AbstractFamily, Weight, linear
from kvjax.models.families.rotary import partial_factor, rope_kind, rope_settings
from kvjax.models.families.settings import Settings
from kvjax.models.families.windows import one_window, same_window


@final
class Phi3(AbstractFamily):
    """`Phi3ForCausalLM`; its long-context variants use longrope."""

    model_type = "phi3"
    architecture = "Phi3ForCausalLM"
    partial_rotary = True
    defaults = MappingProxyType(
        {
            "bos_token_id": 1,
            "eos_token_id": 32_000,
            "pad_token_id": 32_000,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        }
    )

    def extras(self, config: Settings) -> dict[str, Any]:
        """`sliding_window` (null: none) holds for all layers."""
        hidden = config.get("hidden_size", Positive)
        own = hidden // config.get("num_attention_heads", Positive)
        given = config.get("head_dim", Positive, own)
        if given != own:
            raise ValueError(
                f"'phi3' has head_dim = hidden_size / num_attention_heads = {own}; got "
                f"{given}."
            )
        return {"windows": same_window(config)}

    def read_ropes(self, config: Settings, head_dim: int) -> dict[str, Any]:
        """Old files say "su" or "yarn" where this architecture has longrope."""
        settings = rope_settings(config)
        kind = rope_kind(settings)
        if kind in ("su", "yarn") and "short_factor" in settings:
            renamed = {k: v for k, v in settings.values.items() if k != "type"}
            renamed["rope_type"] = "longrope"
            one = {"rope_scaling": renamed, "rope_parameters": None}
            config = Settings({**config.values, **one})
        elif kind not in ("", "default", "longrope"):
            _refuse(kind)
        return super().read_ropes(config, head_dim)

    def write_extras(self, config: DecoderConfig) -> dict[str, Any]:
        """Inverse of `extras`."""
        if None in config.windows:
            raise ValueError("'phi3' needs the same window on every layer.")
        if config.rope.kind not in ("default", "longrope"):
            _refuse(config.rope.kind)
        trained = config.rope.original_max_positions or config.max_positions
        return {
            "sliding_window": one_window(config),
            "partial_rotary_factor": partial_factor(config.rope),
            "original_max_position_embeddings": trained,
        }

    def layer_weights(self, config: DecoderConfig) -> dict[str, Weight]:
        """q, k, v and gate, up are stored as one tensor each."""
        out = super().layer_weights(config)
        for name in ("q", "k", "v"):
            del out[f"self_attn.{name}_proj.weight"]
        for name in ("gate", "up"):
            del out[f"mlp.{name}_proj.weight"]
        heads = ("attention.q", "attention.k", "attention.v")
        out |= linear("self_attn.qkv_proj", *heads, bias=False)
        return out | linear("mlp.gate_up_proj", "mlp.gate", "mlp.up", bias=False)


def _refuse(kind: str) -> NoReturn:
    raise ValueError(
        f"RoPE scaling {kind!r:.40} is not supported for 'phi3'; expected 'longrope' "
        f"or 'default'."
    )
