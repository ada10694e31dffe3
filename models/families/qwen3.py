"""Qwen 3: no q/k/v biases by default, RMSNorm on queries and keys."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, final

from kvjax.models.config import DecoderConfig
from kvjax.models.families.base import AbstractFamily
from kvjax.models.families.qwen2 import read_windows, write_windows


@final
class Qwen3(AbstractFamily):
    """`Qwen3ForCausalLM`."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    defaults = MappingProxyType(
        {
            "head_dim": 128,
            "sliding_window": 4096,
            "max_position_embeddings": 32_768,
        }
    )

    def extras(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """`attention_bias` sets the biases of all four projections."""
        bias = bool(config.get("attention_bias", False))
        windows = read_windows(config)
        return {"qk_norm": True, "qkv_bias": bias, "o_bias": bias, "windows": windows}

    def write_extras(self, config: DecoderConfig) -> dict[str, Any]:
        """Inverse of `extras`."""
        return {"attention_bias": config.qkv_bias} | write_windows(config)
