"""Small GGUF files, written by the `gguf` library as llama.cpp's converter does it."""

import pathlib
from typing import Any

import numpy as np
from flax import nnx

from kvjax.models import Decoder, DecoderConfig
from kvjax.models.families import family
from kvjax.models.weights import _stored, dotted

ARCHITECTURES = {"gemma3_text": "gemma3", "mistral": "llama"}
WORDS = ["<unk>", "<s>", "</s>", "<|im_end|>", *(f"word{n}" for n in range(36))]


def tensors_of(model: Decoder) -> dict[str, np.ndarray]:
    """A model's tensors by their names in Hugging Face checkpoints."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    arrays = {dotted(path): leaf.get_value() for path, leaf in flat}
    weights = family(model.config.family).weights(model.config)
    return {n: np.concatenate([*_stored(n, w, arrays)]) for n, w in weights.items()}


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in llama.cpp's order, by the formula of its converter."""
    shape = (heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return rows.reshape(shape).swapaxes(1, 2).reshape(rows.shape)


def converted(name: str, value: np.ndarray, config: DecoderConfig) -> np.ndarray:
    """A tensor as it is stored."""
    if config.family in ("llama", "mistral"):
        for part, heads in (("q", config.num_heads), ("k", config.num_kv_heads)):
            if f".{part}_proj." in name:
                return permuted(value, heads)
    if config.family == "gemma3_text" and name.endswith("norm.weight"):
        return value + 1
    return value


def write_gguf(
    path: pathlib.Path,
    model: Decoder,
    kinds: Any = None,
    settings: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    tokens: bool = True,
) -> pathlib.Path:
    """`path`, where the model is then.

    Args:
        path: the file.
        model: what is stored.
        kinds: of a name, the type that its tensor is quantised to, or None.
        settings: of the metadata; they replace those of the model, None takes one out.
        extra: further tensors, by their names in the file.
        tokens: whether there is a vocabulary.
    """
    import gguf

    config = model.config
    arch = ARCHITECTURES.get(config.family, config.family)
    ids = {name: at for at, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(ids[arch], config.num_layers)
    writer = gguf.GGUFWriter(path, arch)
    for name, value in (metadata_of(config, arch, tokens) | (settings or {})).items():
        add(writer, name, value)
    for name, value in tensors_of(model).items():
        own = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert own is not None, name
        value = converted(name, value.astype(np.float32), config)
        kind = kinds(own) if kinds else None
        if kind is None:
            writer.add_tensor(own, value)
        else:
            data = gguf.quants.quantize(value, kind)
            writer.add_tensor(own, data, raw_dtype=kind)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def metadata_of(config: DecoderConfig, arch: str, tokens: bool) -> dict[str, Any]:
    window = next((w for w in config.windows if w), None)
    own = {
        "block_count": config.num_layers,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope.theta,
        "rope.dimension_count": config.rope.width,
        "attention.sliding_window": window,
    }
    out: dict[str, Any] = {f"{arch}.{name}": value for name, value in own.items()}
    if tokens:
        out |= words(config.vocab_size)
    return out


def words(count: int) -> dict[str, Any]:
    """A vocabulary of pieces with nothing in it but whole words."""
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": WORDS[:count],
        "tokenizer.ggml.scores": [-float(n) for n in range(count)],
        "tokenizer.ggml.token_type": [2, 3, 3, 3, *[1] * (count - 4)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def add(writer: Any, name: str, value: Any) -> None:
    """One setting, of the type that llama.cpp's converter gives it."""
    if value is None or name == "general.architecture":
        return
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)
