"""Mistral: Llama with a sliding window on every layer."""

from types import MappingProxyType
from typing import Any, final

from kvjax.models.config import DecoderConfig
from kvjax.models.families.base import AbstractFamily
from kvjax.models.families.settings import Settings
from kvjax.models.families.windows import one_window, same_window


@final
class Mistral(AbstractFamily):
    """`MistralForCausalLM`."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    defaults = MappingProxyType(
        {
            "bos_token_id": 1,
            "eos_token_id": 2,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "sliding_window": 4096,
        }
    )

    def extras(self, config: Settings) -> dict[str, Any]:
        """`sliding_window` (null: none) holds for all layers."""
        return {"windows": same_window(config)}

    def write_extras(self, config: DecoderConfig) -> dict[str, Any]:
        """Inverse of `extras`."""
        if None in config.windows:
            raise ValueError("'mistral' needs the same window on every layer.")
        return {"sliding_window": one_window(config)}
