"""Registry of families by the `model_type` of their `config.json`."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from kvjax.messages import nearest, shown
from kvjax.models.config import DecoderConfig
from kvjax.models.families.base import AbstractFamily as AbstractFamily
from kvjax.models.families.base import Weight as Weight
from kvjax.models.families.gemma3 import Gemma3
from kvjax.models.families.llama import Llama
from kvjax.models.families.mistral import Mistral
from kvjax.models.families.phi3 import Phi3
from kvjax.models.families.qwen2 import Qwen2
from kvjax.models.families.qwen3 import Qwen3

FAMILIES: Mapping[str, AbstractFamily] = MappingProxyType(
    {
        "gemma3_text": Gemma3(),
        "llama": Llama(),
        "mistral": Mistral(),
        "phi3": Phi3(),
        "qwen2": Qwen2(),
        "qwen3": Qwen3(),
    }
)


def family(model_type: str) -> AbstractFamily:
    """The family of a `model_type`.

    Raises:
        ValueError: it is not supported; the message names the nearest that is.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"Architecture {shown(model_type)} is not supported; expected "
            f"`model_type` to be one of {sorted(FAMILIES)}."
            f"{nearest(model_type, FAMILIES)}"
        )
    return FAMILIES[model_type]


def read_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """`DecoderConfig` of a parsed `config.json`."""
    if "model_type" not in raw:
        raise ValueError(
            f"it needs `model_type`, one of {sorted(FAMILIES)}; got the keys "
            f"{shown(sorted(raw))}."
        )
    return family(raw["model_type"]).read(raw)
