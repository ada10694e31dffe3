"""`generation_config.json`: end tokens and how replies are drawn, in and out.

Every field survives from `load` to `save`; those that are not ours as they were.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from kvjax.fields import Amount, Count, Fraction
from kvjax.files import read_json
from kvjax.models.config import DecoderConfig
from kvjax.models.families.base import special_tokens
from kvjax.models.families.settings import Settings
from kvjax.models.sampling import Sampling

FILE = "generation_config.json"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NEUTRAL = {"repetition_penalty": 1, "min_p": 0, "typical_p": 1, "num_beams": 1}
"""Fields that change replies and that we do not apply, with the values that do not."""


def with_generation(config: DecoderConfig, folder: pathlib.Path) -> DecoderConfig:
    """`config` with what the directory's `generation_config.json` says, if it is there.

    Chat checkpoints keep their end-of-turn tokens there alone.

    Raises:
        ValueError: it cannot be read, or a field is of another type or out of range.
    """
    path = folder / FILE
    if not os.path.lexists(path):
        return config
    raw = read_json(path)  # names the file
    try:
        settings = Settings(raw)
        stops = special_tokens(settings, "eos_token_id", config.vocab_size)
        others = {name: raw[name] for name in raw if name not in _TOKENS}
        sampling_of(others)
    except ValueError as wrong:
        raise ValueError(f"{path}: {wrong}") from None
    text = json.dumps(others, sort_keys=True) if others else ""
    return dataclasses.replace(
        config, eos_tokens=stops or config.eos_tokens, generation=text
    )


def generation_settings(config: DecoderConfig) -> dict[str, Any]:
    """What `generation_config.json` of a saved model says."""
    eos: Any = list(config.eos_tokens)
    tokens = {
        "bos_token_id": config.bos_token,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config.pad_token,
    }
    given = {name: value for name, value in tokens.items() if value is not None}
    return config.generation_settings | given


def sampling_of(given: Mapping[str, Any]) -> tuple[Sampling, dict[str, Any]]:
    """How a `generation_config.json` has replies drawn, and what of it is not ours.

    Raises:
        ValueError: a field is of another type or out of range.
    """
    settings = Settings(given)
    others = {
        name: given[name]
        for name, neutral in _NEUTRAL.items()
        if given.get(name) not in (None, neutral)
    }
    heat = settings.get("temperature", Amount, 1.0)
    top_k = settings.get("top_k", Count, 0) or None
    top_p = settings.get("top_p", Fraction, None)
    if not settings.get("do_sample", bool, False):
        return Sampling(), others
    return Sampling(temperature=heat, top_k=top_k, top_p=top_p), others
