"""Llama 2 and 3: the plain pre-norm decoder, optional biases."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, final

from kvjax.models.config import DecoderConfig
from kvjax.models.families.base import AbstractFamily


@final
class Llama(AbstractFamily):
    """`LlamaForCausalLM`."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    defaults = MappingProxyType({"bos_token_id": 1, "eos_token_id": 2})

    def extras(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """One switch sets the biases of all four attention projections."""
        bias = bool(config.get("attention_bias", False))
        return {
            "qkv_bias": bias,
            "o_bias": bias,
            "mlp_bias": bool(config.get("mlp_bias", False)),
        }

    def write_extras(self, config: DecoderConfig) -> dict[str, Any]:
        """Inverse of `extras`."""
        return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
