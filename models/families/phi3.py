"""Phi-3 and Phi-4-mini: fused projections in the checkpoint, partial rotation."""

from types import MappingProxyType
from typing import Any, final

from kvjax.fields import Positive
from kvjax.models.config import DecoderConfig
from kvjax.models.families.base import AbstractFamily, Weight, linear
from kvjax.models.families.rotary import write_rope
from kvjax.models.families.settings import Settings
from kvjax.models.families.windows import one_window, same_window


@final
class Phi3(AbstractFamily):
    """`Phi3ForCausalLM`; its long-context variants use longrope, which is refused."""

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
        """Only unscaled RoPE: the architecture reads "yarn" as longrope."""
        ropes = super().read_ropes(config, head_dim)
        _check_rope(ropes["rope"].kind)
        return ropes

    def write_extras(self, config: DecoderConfig) -> dict[str, Any]:
        """Inverse of `extras`."""
        if None in config.windows:
            raise ValueError("'phi3' needs the same window on every layer.")
        _check_rope(config.rope.kind)
        _, _, partial = write_rope(config.rope)
        return {
            "sliding_window": one_window(config),
            "partial_rotary_factor": partial,
            "original_max_position_embeddings": config.max_positions,
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


def _check_rope(kind: str) -> None:
    if kind != "default":
        raise ValueError(
            f"RoPE scaling {kind!r} is not supported for 'phi3'; expected 'default' "
            f"(the short-context checkpoints)."
        )
