"""Settings of a GGUF file: asked by name, type and range, and as a `config.json`."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from kvjax.fields import Amount, Count, Positive, PositiveReal, fit
from kvjax.messages import nearest, shown
from kvjax.models.gguf.header import Header
from kvjax.models.gguf.names import LAYERS
from kvjax.models.gguf.rope import RopeTensors, rope_settings
from kvjax.models.gguf.walk import Array

_NONE: Any = object()
NO_TOKEN = 2**32 - 1
"""What some writers say of a token that there is not."""

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


class Metadata:
    """The metadata of a file, by its architecture.

    Raises:
        ValueError: the architecture is missing or not read.
    """

    def __init__(self, header: Header):
        self.header = header
        name = self.get("general.architecture", str)
        if name not in LAYERS:
            raise ValueError(
                f"{header.path} has the architecture {shown(name)}, which is not read; "
                f"expected one of {sorted(LAYERS)}.{nearest(name, LAYERS)}"
            )
        self.architecture = name

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.own("attention.head_count", Positive)

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.own("attention.head_count_kv", Positive, self.heads)

    def get(self, name: str, hint: Any, default: Any = _NONE) -> Any:
        """A setting by its whole name, as `hint` has it.

        Raises:
            ValueError: another type or out of range; missing without a `default`.
        """
        known = self.header.metadata
        if name not in known:
            if default is not _NONE:
                return default
            raise ValueError(
                f"{self.header.path} lacks the setting `{name}`."
                f"{nearest(name, known)} Convert it again with a current llama.cpp."
            )
        value = known[name]
        if isinstance(value, Array):
            value = self._same(name)
        try:
            return fit(value, hint, name)
        except ValueError as wrong:
            raise ValueError(f"{self.header.path}: {wrong}") from None

    def own(self, name: str, hint: Any, default: Any = _NONE) -> Any:
        """A setting of the architecture, whose name is in front of it."""
        return self.get(f"{self.architecture}.{name}", hint, default)

    def _same(self, name: str) -> Any:
        """What all entries of an array are: some files say it layer by layer."""
        found = self.header.items(name)
        if not found or any(one != found[0] for one in found):
            raise ValueError(
                f"{self.header.path}: `{name}` is an array of {len(found)} entries, "
                f"{shown(found)}; expected one value, the same for all layers."
            )
        return found[0]

    def token(self, kind: str, vocab: int) -> int | None:
        """The id of a special token, or None.

        Raises:
            ValueError: it is no id of the vocabulary.
        """
        name = f"tokenizer.ggml.{kind}_token_id"
        found = self.get(name, Any, None)
        if found is None or found in (NO_TOKEN, -1):
            return None
        if type(found) is not int or not 0 <= found < vocab:
            raise ValueError(
                f"{self.header.path}: `{name}` is {shown(found)}, which is no id of "
                f"the vocabulary of {vocab}."
            )
        return found

    def check(self) -> None:
        """Nothing is said that would change the numbers and is not read.

        Raises:
            ValueError: names it.
        """
        front = f"{self.architecture}."
        for whole, value in self.header.metadata.items():
            name = whole.removeprefix(front)
            if name == whole or name in _READ | _INERT | {*_CAPS}:
                continue
            if name in _NEUTRAL and self.get(whole, Any) in _NEUTRAL[name]:
                continue
            known = _NEUTRAL.get(name)
            raise ValueError(
                f"{self.header.path}: the setting `{whole[:200]}` ({shown(value)}) is "
                "not read, and may change the model's numbers; expected "
                + (f"{list(known)} or none." if known else "none.")
            )

    def config(self) -> dict[str, Any]:
        """The settings as a Hugging Face `config.json` has them.

        Raises:
            ValueError: one is missing, of another type, or contradicts the tensors.
        """
        self.check()
        vocab = self._vocab()
        head_dim = self._head_dim()
        layers = self.own("block_count", Positive)
        tensors = self.header.tensors
        out: dict[str, Any] = {
            "model_type": self.architecture,
            "vocab_size": vocab,
            "hidden_size": self.own("embedding_length", Positive),
            "intermediate_size": self.own("feed_forward_length", Positive),
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": self.own("context_length", Positive),
            "rms_norm_eps": self.own("attention.layer_norm_rms_epsilon", PositiveReal),
            "tie_word_embeddings": "output.weight" not in tensors,
            "attention_bias": "blk.0.attn_output.bias" in tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in tensors,
            "bos_token_id": self.token("bos", vocab),
            "pad_token_id": self.token("padding", vocab),
            "eos_token_id": self._stops(vocab) or None,
        }
        for own, name in _CAPS.items():
            out[name] = self.own(own, Amount, None)
        out |= rope_settings(self, head_dim, RopeTensors(self.header))
        return out | self._windows(layers) | self._scale(layers, head_dim, out)

    def _vocab(self) -> int:
        """Rows of the embedding, which holds all tokens there are."""
        name = "token_embd.weight"
        tensor = self.header.tensors.get(name)
        if tensor is None or len(tensor.shape) != 2:
            raise ValueError(f"{self.header.path} lacks the matrix {name!r}.")
        rows = tensor.shape[0]
        said = self.own("vocab_size", Positive, rows)
        tokens = self.header.metadata.get("tokenizer.ggml.tokens")
        known = tokens.count if isinstance(tokens, Array) else rows
        if said != rows or known > rows:
            raise ValueError(
                f"{self.header.path} contradicts itself: {name!r} has {rows} rows, "
                f"`{self.architecture}.vocab_size` is {said}, and there are {known} "
                "tokens."
            )
        return rows

    def _head_dim(self) -> int:
        hidden = self.own("embedding_length", Positive)
        usual = hidden // self.heads
        width = self.own("attention.key_length", Positive, usual)
        other = self.own("attention.value_length", Positive, usual)
        if width != other:
            raise ValueError(
                f"{self.header.path}: heads of keys have {width} channels and those of "
                f"values {other} (`attention.key_length`, `attention.value_length`); "
                "expected as many."
            )
        return width

    def _stops(self, vocab: int) -> list[int]:
        """The tokens that end a reply: those that are named, and ends of turns."""
        named = [self.token(kind, vocab) for kind in ("eos", "eot", "eom")]
        metadata, places = self.header.metadata, []
        arrays = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
        if all(isinstance(metadata.get(name), Array) for name in arrays):
            tokens, types = (self.header.items(name) for name in arrays)
            places = [tokens.index(one) for one in _STOPS if one in tokens]
            places = [p for p in places if p < len(types) and types[p] == _CONTROL]
        return list(dict.fromkeys([*(n for n in named if n is not None), *places]))

    def _windows(self, layers: int) -> dict[str, Any]:
        """Sliding windows, by the rules of each architecture."""
        window = self.own("attention.sliding_window", Count, 0) or None
        out: dict[str, Any] = {"sliding_window": window}
        if self.architecture == "llama" and window:
            return out | {"model_type": "mistral"}
        if self.architecture != "gemma3":
            if self.architecture in ("qwen2", "qwen3") and window:
                raise ValueError(
                    f"{self.header.path}: `{self.architecture}.attention.sliding_"
                    f"window` is {window}, and nothing says which layers have it."
                )
            return out
        name = "gemma3.attention.sliding_window_pattern"
        if isinstance(self.header.metadata.get(name), Array):
            slides = [bool(one) for one in self.header.items(name)]
        else:
            every = self.get(name, Positive, 6)
            slides = [(layer + 1) % every != 0 for layer in range(min(layers, 10_000))]
        kinds = ("full_attention", "sliding_attention")
        types = [kinds[slide and window is not None] for slide in slides]
        return out | {"model_type": "gemma3_text", "layer_types": types}

    def _scale(
        self, layers: int, head_dim: int, config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What scores are multiplied by, which files of one architecture say."""
        scale = self.own("attention.scale", PositiveReal, None)
        if self.architecture == "gemma3":
            wide = config["hidden_size"] // config["num_attention_heads"]
            scalar = wide if layers == _GEMMA_27B else head_dim
            return {"query_pre_attn_scalar": scalar if scale is None else scale**-2}
        if scale is not None and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-6):
            raise ValueError(
                f"{self.header.path}: `{self.architecture}.attention.scale` is "
                f"{scale}; expected {head_dim**-0.5} or none."
            )
        return {}
