"""Llama 2 and 3: the plain pre-norm decoder, optional biases."""

from types import MappingProxyType
from typing import Any, final

from kvjax.models.config import DecoderConfig
from kvjax.models.families.base import AbstractFamily
from kvjax.models.families.settings import Settings
from kvjax.models.families.windows import check_alike


@final
class Llama(AbstractFamily):
    """`LlamaForCausalLM`."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    defaults = MappingProxyType({"bos_token_id": 1, "eos_token_id": 2})

    def extras(self, config: Settings) -> dict[str, Any]:
        """One switch sets the biases of all four attention projections."""
        bias = config.get("attention_bias", bool, False)
        check_alike(config, None)
        return {
            "qkv_bias": bias,
            "o_bias": bias,
            "mlp_bias": config.get("mlp_bias", bool, False),
        }

    def write_extras(self, config: DecoderConfig) -> dict[str, Any]:
        """Inverse of `extras`."""
        return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
