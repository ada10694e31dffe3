"""Settings of a GGUF file as a Hugging Face `config.json` has them."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from kvjax.fields import Amount, Count, Positive, PositiveReal
from kvjax.messages import shown
from kvjax.models.gguf.metadata import Metadata
from kvjax.models.gguf.rope import rope_settings
from kvjax.models.gguf.walk import Array

_STOPS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
"""Ends of turns; where they are control tokens they end a reply. Files name one end."""
_CONTROL = 3

# Settings of the architecture, without its name: those that are read, and those that
# say nothing about the numbers. Another one might change them, and is refused.
_READ = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.scale",
        "attention.sliding_window",
        "attention.sliding_window_pattern",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.freq_base_swa",
        "rope.scale_linear",
        "rope.scaling.attn_factor",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "vocab_size",
    }
)
_INERT = frozenset({"rope.scaling.finetuned", "tensor_data_layout"})
_NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "attention.causal": (True,),
        "attention.clamp_kqv": (0.0,),
        "attention.max_alibi_bias": (0.0,),
        "embedding_scale": (0.0, 1.0),
        "expert_count": (0,),
        "expert_used_count": (0,),
        "logit_scale": (0.0, 1.0),
        "pooling_type": (0,),
        "residual_scale": (0.0, 1.0),
        "rope.scaling.yarn_attn_factor": (1.0,),
        "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
        "rope.scaling.yarn_log_multiplier": (0.0,),
        "use_parallel_residual": (False,),
    }
)
"""Settings with the values that change nothing."""
_CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GEMMA_27B = 62
"""Layers of the one Gemma 3 whose queries are not scaled by its heads' width."""


def _check(about: Metadata) -> None:
    """Nothing is said that would change the numbers and is not read.

    Raises:
        ValueError: names it.
    """
    front = f"{about.architecture}."
    for whole, value in about.header.metadata.items():
        name = whole.removeprefix(front)
        if name == whole or name in _READ | _INERT | {*_CAPS}:
            continue
        if name in _NEUTRAL and about.get(whole, Any) in _NEUTRAL[name]:
            continue
        known = _NEUTRAL.get(name)
        raise ValueError(
            f"{about.header.path}: the setting `{whole[:200]}` ({shown(value)}) is "
            "not read, and may change the model's numbers; expected "
            + (f"{list(known)} or none." if known else "none.")
        )


def as_config(about: Metadata) -> dict[str, Any]:
    """The settings as a Hugging Face `config.json` has them.

    Raises:
        ValueError: one is missing, of another type, or contradicts the tensors.
    """
    _check(about)
    vocab = _vocab(about)
    head_dim = _head_dim(about)
    layers = about.own("block_count", Positive)
    tensors = about.header.tensors
    out: dict[str, Any] = {
        "model_type": about.architecture,
        "vocab_size": vocab,
        "hidden_size": about.own("embedding_length", Positive),
        "intermediate_size": about.own("feed_forward_length", Positive),
        "num_hidden_layers": layers,
        "num_attention_heads": about.heads,
        "num_key_value_heads": about.kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": about.own("context_length", Positive),
        "rms_norm_eps": about.own("attention.layer_norm_rms_epsilon", PositiveReal),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "bos_token_id": about.token("bos", vocab),
        "pad_token_id": about.token("padding", vocab),
        "eos_token_id": _stops(about, vocab) or None,
    }
    for own, name in _CAPS.items():
        out[name] = about.own(own, Amount, None)
    out |= rope_settings(about, head_dim)
    return out | _windows(about, layers) | _scale(about, layers, head_dim, out)


def _vocab(about: Metadata) -> int:
    """Rows of the embedding, which holds all tokens there are."""
    name = "token_embd.weight"
    tensor = about.header.tensors.get(name)
    if tensor is None or len(tensor.shape) != 2:
        raise ValueError(f"{about.header.path} lacks the matrix {name!r}.")
    rows = tensor.shape[0]
    said = about.own("vocab_size", Positive, rows)
    tokens = about.header.metadata.get("tokenizer.ggml.tokens")
    known = tokens.count if isinstance(tokens, Array) else rows
    if said != rows or known > rows:
        raise ValueError(
            f"{about.header.path} contradicts itself: {name!r} has {rows} rows, "
            f"`{about.architecture}.vocab_size` is {said}, and there are {known} "
            "tokens."
        )
    return rows


def _head_dim(about: Metadata) -> int:
    hidden = about.own("embedding_length", Positive)
    usual = hidden // about.heads
    width = about.own("attention.key_length", Positive, usual)
    other = about.own("attention.value_length", Positive, usual)
    if width != other:
        raise ValueError(
            f"{about.header.path}: heads of keys have {width} channels and those of "
            f"values {other} (`attention.key_length`, `attention.value_length`); "
            "expected as many."
        )
    return width


def _stops(about: Metadata, vocab: int) -> list[int]:
    """The tokens that end a reply: those that are named, and ends of turns."""
    named = [about.token(kind, vocab) for kind in ("eos", "eot", "eom")]
    metadata, places = about.header.metadata, []
    arrays = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
    if all(isinstance(metadata.get(name), Array) for name in arrays):
        tokens, types = (about.header.items(name) for name in arrays)
        places = [tokens.index(one) for one in _STOPS if one in tokens]
        places = [p for p in places if p < len(types) and types[p] == _CONTROL]
    return list(dict.fromkeys([*(n for n in named if n is not None), *places]))


def _windows(about: Metadata, layers: int) -> dict[str, Any]:
    """Sliding windows, by the rules of each architecture."""
    window = about.own("attention.sliding_window", Count, 0) or None
    out: dict[str, Any] = {"sliding_window": window}
    if about.architecture == "llama" and window:
        return out | {"model_type": "mistral"}
    if about.architecture != "gemma3":
        if about.architecture in ("qwen2", "qwen3") and window:
            raise ValueError(
                f"{about.header.path}: `{about.architecture}.attention.sliding_"
                f"window` is {window}, and nothing says which layers have it."
            )
        return out
    name = "gemma3.attention.sliding_window_pattern"
    if isinstance(about.header.metadata.get(name), Array):
        slides = [bool(one) for one in about.by_layer(name)]
    else:
        every = about.get(name, Positive, 6)
        slides = [(layer + 1) % every != 0 for layer in range(min(layers, 10_000))]
    kinds = ("full_attention", "sliding_attention")
    types = [kinds[slide and window is not None] for slide in slides]
    return out | {"model_type": "gemma3_text", "layer_types": types}


def _scale(
    about: Metadata, layers: int, head_dim: int, config: Mapping[str, Any]
) -> dict[str, Any]:
    """What scores are multiplied by, which files of one architecture say."""
    scale = about.own("attention.scale", PositiveReal, None)
    if about.architecture == "gemma3":
        wide = config["hidden_size"] // config["num_attention_heads"]
        scalar = wide if layers == _GEMMA_27B else head_dim
        return {"query_pre_attn_scalar": scalar if scale is None else scale**-2}
    if scale is not None and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-6):
        raise ValueError(
            f"{about.header.path}: `{about.architecture}.attention.scale` is "
            f"{scale}; expected {head_dim**-0.5} or none."
        )
    return {}
