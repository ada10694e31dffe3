"""LoRA updates as an adapter in PEFT's layout, which `load` and PEFT read."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from safetensors.numpy import save as serialized

from kvjax.files import write_bytes, write_json
from kvjax.models.config import DecoderConfig
from kvjax.models.families import family
from kvjax.models.hub import ADAPTER, ADAPTER_CONFIG
from kvjax.places import check_place, expanded

Updates = Mapping[str, tuple[ArrayLike, ArrayLike]]
"""By matrix, as `attention.q`: A `[L, in, r]` and B `[L, r, out]`."""

_PREFIX = "base_model.model."


def fused(config: DecoderConfig, matrices: Sequence[str]) -> list[str]:
    """Those matrices that checkpoints of this family store as a part of another one.

    PEFT's updates are of what is stored, so these have none of their own.
    """
    stored = _stored(config)
    return [one for one in matrices if one not in stored]


def save_adapter(
    directory: pathlib.Path,
    config: DecoderConfig,
    updates: Updates,
    *,
    base: str,
    alpha: float,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, in this order.

    Args:
        directory: where; it is made.
        config: of the model.
        updates: all of one rank.
        base: the model that they are of: a name, a hub id, or a path.
        alpha: updates are scaled by `alpha / r`.

    Raises:
        ValueError: the place cannot be written to; a matrix is `fused`.
    """
    check_place(directory, "Give another directory.")
    if parts := fused(config, list(updates)):
        raise ValueError(
            f"{config.family!r} stores {parts} within other matrices, so that there is "
            "no adapter of these alone. Save the merged model."
        )
    stored, tensors, modules = _stored(config), {}, set()
    rank = {np.shape(a)[-1] for a, _ in updates.values()}
    for matrix, pair in updates.items():
        a, b = map(np.asarray, pair)
        for layer, name in stored[matrix].items():
            module = name.removesuffix(".weight")
            modules.add(module.rpartition(".")[2])
            for side, held in (("A", a[layer]), ("B", b[layer])):
                key = f"{_PREFIX}{module}.lora_{side}.weight"
                tensors[key] = np.ascontiguousarray(held.T)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _named(base),
        "r": rank.pop(),
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted(modules),
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / ADAPTER_CONFIG, settings)
    write_bytes(directory / ADAPTER, serialized(tensors, {"format": "pt"}))


def _named(base: str) -> str:
    """A path as it is from anywhere; other names as they are."""
    path = expanded(base)
    return os.path.abspath(path) if os.path.exists(path) else base


def _stored(config: DecoderConfig) -> dict[str, dict[int, Any]]:
    """Names of tensors by matrix and layer; of those that are tensors of their own."""
    found: dict[str, dict[int, Any]] = {}
    for name, weight in family(config.family).weights(config).items():
        if weight.layer is None or len(weight.paths) != 1 or not weight.transpose:
            continue
        matrix = weight.paths[0].removeprefix("layers.").removesuffix(".kernel")
        found.setdefault(matrix, {})[weight.layer] = name
    return found
