"""One small decoder configuration per family, every switch of the family thrown."""

from typing import Any

import numpy as np
from flax import nnx

from kvjax.models import Decoder, DecoderConfig
from kvjax.rope import Rope

_SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 4,
    "max_positions": 64,
    "bos_token": 1,
    "eos_tokens": (2, 3),
    "rope": Rope(head_dim=4),
}
_YARN = Rope(head_dim=4, kind="yarn", factor=4.0, original_max_positions=16)
_LLAMA3 = Rope(
    head_dim=4, theta=5e5, kind="llama3", factor=8.0, original_max_positions=16
)

CONFIGS: dict[str, DecoderConfig] = {
    family: DecoderConfig(**(_SMALL | fields), family=family)
    for family, fields in {
        "gemma3_text": {
            "activation": "gelu_tanh",
            "attention_scale": 10.0**-0.5,
            "embedding_scale": 4.0,
            "final_softcap": 15.0,
            "local_rope": Rope(head_dim=4),
            "norm_offset": True,
            "post_norms": True,
            "qk_norm": True,
            "rope": Rope(head_dim=4, theta=1e6, kind="linear", factor=8.0),
            "tie_embeddings": True,
            "windows": (8, None, 8),
        },
        "llama": {"rope": _LLAMA3, "qkv_bias": True, "o_bias": True, "mlp_bias": True},
        "mistral": {"windows": (8, 8, 8)},
        "phi3": {"rope": Rope(head_dim=4, rotary_dim=2), "windows": (8, 8, 8)},
        "qwen2": {"rope": _YARN, "qkv_bias": True, "windows": (None, 8, 8)},
        "qwen3": {"qk_norm": True, "tie_embeddings": True},
    }.items()
}


def sample(family: str, dtype: Any = np.float32) -> Decoder:
    """A fresh random model of a family."""
    return Decoder(CONFIGS[family], dtype=dtype, rngs=nnx.Rngs(0))
