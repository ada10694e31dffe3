"""Qwen 3: no q/k/v biases by default, RMSNorm on queries and keys."""

from types import MappingProxyType
from typing import Any, final

from kvjax.models.config import DecoderConfig
from kvjax.models.families.base import AbstractFamily
from kvjax.models.families.qwen2 import read_windows, write_windows
from kvjax.models.families.settings import Settings


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

    def extras(self, config: Settings) -> dict[str, Any]:
        """`attention_bias` sets the biases of all four projections."""
        bias = config.get("attention_bias", bool, False)
        windows = read_windows(config)
        return {"qk_norm": True, "qkv_bias": bias, "o_bias": bias, "windows": windows}

    def write_extras(self, config: DecoderConfig) -> dict[str, Any]:
        """Inverse of `extras`."""
        return {"attention_bias": config.qkv_bias} | write_windows(config)
