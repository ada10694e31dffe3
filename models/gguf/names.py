"""Tensors of a GGUF file by their names in Hugging Face checkpoints, and their order.

Two things are done to weights when a file is written, and undone here. llama.cpp turns
neighbouring channels of `llama`, where Hugging Face turns the two halves of a head:
rows of q and k are in another order. And norms of Gemma, which multiply by `1 + w`, are
stored as that sum.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_COMMON = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FUSED = {
    name: _COMMON[name] for name in ("attn_norm", "attn_output", "ffn_norm", "ffn_down")
} | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_FOUR_NORMS = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

LAYERS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "llama": _COMMON,
        "qwen2": _COMMON,
        "qwen3": _COMMON | _QK_NORM,
        "phi3": _FUSED,
        "gemma3": _COMMON | _QK_NORM | _FOUR_NORMS,
    }
)
"""Architectures, and the tensors of a layer."""

ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)
"""Tensors that are settings; see `kvjax.models.gguf.rope`."""

_LAYER = re.compile(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)")


def checkpoint_name(architecture: str, name: str) -> str:
    """A tensor's name in a checkpoint; its own where the architecture has none such."""
    if name in _TOP:
        return _TOP[name]
    found = _LAYER.fullmatch(name)
    known = LAYERS[architecture]
    if found is None or found[2] not in known:
        return name
    return f"model.layers.{int(found[1])}.{known[found[2]]}.{found[3]}"


def heads_of(architecture: str, name: str, heads: int, kv_heads: int) -> int:
    """In how many heads a tensor's rows are in llama.cpp's order; 0: they are not."""
    found = _LAYER.fullmatch(name)
    if architecture != "llama" or found is None:
        return 0
    return {"attn_q": heads, "attn_k": kv_heads}.get(found[2], 0)


def is_shifted(architecture: str, name: str) -> bool:
    """Whether a tensor holds `1 + w`."""
    return architecture == "gemma3" and name.endswith("norm.weight")
