"""Qwen 2 and 2.5: biases on q, k, v; windows on the upper layers where switched on."""

from types import MappingProxyType
from typing import Any, final

from kvjax.fields import Count, Positive
from kvjax.models.config import DecoderConfig, Layers
from kvjax.models.families.base import AbstractFamily
from kvjax.models.families.settings import Settings
from kvjax.models.families.windows import (
    FULL,
    SLIDING,
    one_window,
    read_layer_types,
    write_layer_types,
)


@final
class Qwen2(AbstractFamily):
    """`Qwen2ForCausalLM`."""

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    defaults = MappingProxyType(
        {"sliding_window": 4096, "max_position_embeddings": 32_768}
    )

    def extras(self, config: Settings) -> dict[str, Any]:
        """q, k and v always carry biases."""
        return {"qkv_bias": True, "windows": read_windows(config)}

    def write_extras(self, config: DecoderConfig) -> dict[str, Any]:
        """Inverse of `extras`."""
        return write_windows(config)


def read_windows(config: Settings) -> tuple[int | None, ...]:
    """Windows of `use_sliding_window`, `max_window_layers` and `layer_types`."""
    window = config.get("sliding_window", Positive, None)
    if not config.get("use_sliding_window", bool, False):
        window = None
    first = config.get("max_window_layers", Count, 28)
    layers = range(config.get("num_hidden_layers", Layers))
    rule = [SLIDING if window and index >= first else FULL for index in layers]
    return read_layer_types(config, rule, window)


def write_windows(config: DecoderConfig) -> dict[str, Any]:
    """Inverse of `read_windows`; older readers look at `max_window_layers` alone."""
    types, window = write_layer_types(config), one_window(config)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": types.index(SLIDING) if window else len(types),
        "layer_types": types,
    }
