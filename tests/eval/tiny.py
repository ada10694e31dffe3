"""A random character model of two layers, and an evaluation that takes seconds."""

import dataclasses
from typing import Any

from flax import nnx

from kvjax.eval.config import EvalConfig, decode_config
from kvjax.models import Decoder, DecoderConfig
from kvjax.rope import Rope
from kvjax.train.data.tokenizer import build_tokenizer

CONFIG = DecoderConfig(
    vocab_size=100,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope=Rope(head_dim=8),
    max_positions=256,
    init_std=0.3,  # replies that depend on the prompt
    bos_token=1,
)


def model(**fields: Any) -> Decoder:
    """The same weights at every call."""
    return Decoder(dataclasses.replace(CONFIG, **fields), rngs=nnx.Rngs(0))


def tokenizer() -> Any:
    """Of the characters that kvjax-tiny knows."""
    return build_tokenizer()


def config(**fields: Any) -> EvalConfig:
    """Two batches, the second one filled up."""
    tree = {
        "model": "tiny",
        "compressions": ["snapkv"],
        "keeps": [0.5, 0.25],
        "tasks": [{"name": "recall", "fields": {"value_length": 1}}],
        "lengths": [96],
        "items": 5,
        "batch": 3,
        "window": 4,
    }
    return decode_config(tree | fields)
