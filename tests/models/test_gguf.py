"""GGUF files: the same model as in Hugging Face layout, whatever stores it."""

import dataclasses
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.models import Decoder, DecoderConfig, load, save
from kvjax.models.hub import checkpoint_directory
from kvjax.models.io import load_config
from kvjax.models.weights import dotted
from kvjax.rope import Rope
from tests.gguf_files import write_gguf
from tests.models.samples import CONFIGS

gguf = pytest.importorskip("gguf", reason="no gguf: pip install kvjax[gguf]")

_PLAIN = {"rope": Rope(head_dim=4, theta=5e5), "windows": ()}
_LLAMA = {"qkv_bias": False, "o_bias": False, "mlp_bias": False}
CASES: dict[str, DecoderConfig] = {
    "llama": dataclasses.replace(CONFIGS["llama"], **_PLAIN, **_LLAMA),
    "llama_bias": dataclasses.replace(CONFIGS["llama"], **_PLAIN),
    "mistral": CONFIGS["mistral"],
    "qwen2": dataclasses.replace(CONFIGS["qwen2"], **_PLAIN),
    "qwen3": dataclasses.replace(CONFIGS["qwen3"], **_PLAIN),
    "phi3": CONFIGS["phi3"],
    "gemma3": dataclasses.replace(
        CONFIGS["gemma3_text"],
        rope=Rope(head_dim=4, theta=1e6),
        windows=(8, 8, 8),
        final_softcap=None,
        attention_scale=0.5,
    ),
}


def model_of(config: DecoderConfig) -> Decoder:
    return Decoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0))


def parameters(model: Decoder) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {dotted(path): np.asarray(leaf.get_value()) for path, leaf in flat}


@pytest.mark.parametrize("case", CASES)
def test_every_architecture(case, tmp_path):
    config = CASES[case]
    model = model_of(config)
    path = write_gguf(tmp_path / "model.gguf", model)
    found, tokenizer = load(path, "float32")
    # What a file does not say does not belong to it.
    wanted = dataclasses.replace(config, init_std=0.02)
    assert dataclasses.replace(found.config, init_std=0.02) == wanted
    assert load_config(path) == found.config
    old, new = parameters(model), parameters(found)
    assert old.keys() == new.keys()
    for name, value in old.items():
        # Gemma's norms went through `1 + w`.
        near = 1e-7 if config.norm_offset and "norm" in name else 0
        np.testing.assert_allclose(new[name], value, rtol=0, atol=near, err_msg=name)
    assert tokenizer.decode([5]) == "word1"


@pytest.mark.parametrize(
    "kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
)
def test_quantised(kind, tmp_path, monkeypatch):
    """What is read is what the library says it is, chunk by chunk."""
    from kvjax.models.gguf import weights

    monkeypatch.setattr(weights, "CHUNK_BYTES", 4 * 64 * 5)
    config = dataclasses.replace(
        CASES["llama"], hidden_size=64, intermediate_size=64, head_dim=16,
        rope=Rope(head_dim=16),
    )  # fmt: skip
    model, number = model_of(config), gguf.GGMLQuantizationType[kind]
    names = ("token_embd", "attn_q.", "attn_k.", "ffn_down", "output.weight")
    path = write_gguf(
        tmp_path / "model.gguf",
        model,
        lambda name: number if any(n in name for n in names) else None,
    )
    found, _ = load(path, "float32", tokenizer=False)
    old, new = parameters(model), parameters(found)
    for name in ("embedding", "layers.attention.q.kernel", "layers.mlp.down.kernel"):
        rows = old[name].reshape(-1, *old[name].shape[-2:])
        flip = name != "embedding"
        rows = rows.swapaxes(-1, -2) if flip else rows
        data = gguf.quants.quantize(rows.copy(), number)
        wanted = gguf.quants.dequantize(data, number).astype(np.float32)
        wanted = wanted.swapaxes(-1, -2) if flip else wanted
        np.testing.assert_array_equal(new[name], wanted.reshape(new[name].shape))
        assert kind == "F16" or not np.array_equal(new[name], old[name])


def test_every_type_that_the_library_reads(tmp_path, monkeypatch):
    """Of rows of any bytes, in pieces and in llama's order of rows."""
    from kvjax.models.gguf import gguf_weights, library, weights
    from tests.gguf_files import permuted

    monkeypatch.setattr(weights, "CHUNK_BYTES", 4 * 256 * 3)
    readable, rng = library._readable(), np.random.default_rng(0)
    names = {name for name, *_ in readable.values()}
    assert names > {"F16", "BF16", "Q4_K", "Q6_K", "IQ4_NL", "IQ2_XXS", "IQ1_S"}
    rows = 16
    for number, (name, block, size) in readable.items():
        kind = gguf.GGMLQuantizationType(number)
        data = rng.integers(0, 256, (rows, 256 // block * size), np.uint8)
        path = tmp_path / f"{name}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_head_count(4)
        for tensor in ("token_embd.weight", "blk.0.attn_q.weight"):
            writer.add_tensor(tensor, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with np.errstate(all="ignore"):
            wanted = gguf.quants.dequantize(data, kind).astype(np.float32)
        held = gguf_weights(path)
        found = np.concatenate([*held.rows("model.embed_tokens.weight", 0, rows)])
        np.testing.assert_array_equal(found, wanted, err_msg=name)
        found = [*held.rows("model.layers.0.self_attn.q_proj.weight", 0, rows)]
        assert len(found) > 1
        turned = permuted(np.concatenate(found), 4)
        np.testing.assert_array_equal(turned, wanted, err_msg=name)


def test_float16_of_a_file_that_is_named_otherwise(tmp_path):
    path = write_gguf(tmp_path / "model.bin", model_of(CASES["qwen3"]))
    found, _ = load(path, "float16")
    assert found.dtype == jnp.float16 and checkpoint_directory(path) == path


def test_it_is_saved_in_hugging_face_layout(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", model_of(CASES["gemma3"]))
    first, tokenizer = load(path, "float32")
    save(first, tmp_path / "out", tokenizer)
    again, words = load(tmp_path / "out", "float32")
    assert again.config == first.config
    assert words.encode("word1 word2") == tokenizer.encode("word1 word2")
    for name, value in parameters(first).items():
        np.testing.assert_array_equal(parameters(again)[name], value)


LLAMA3 = Rope(
    head_dim=16, theta=5e5, kind="llama3", factor=32.0, original_max_positions=8192
)
LONG = Rope(
    head_dim=4,
    rotary_dim=2,
    kind="longrope",
    factor=4.0,
    original_max_positions=16,
    short_factor=(1.5,),
    long_factor=(3.25,),
    reach=64,
)


def llama3_factors(rope: Rope) -> np.ndarray:
    """As llama.cpp's converter computes them, angle by angle."""
    out = []
    assert rope.original_max_positions is not None
    for i in range(0, rope.head_dim, 2):
        wave = 2 * np.pi * rope.theta ** (i / rope.head_dim)
        low = rope.original_max_positions / rope.low_freq_factor
        high = rope.original_max_positions / rope.high_freq_factor
        if wave < high:
            out.append(1.0)
        elif wave > low:
            out.append(rope.factor)
        else:
            smooth = rope.original_max_positions / wave - rope.low_freq_factor
            smooth /= rope.high_freq_factor - rope.low_freq_factor
            out.append(1 / ((1 - smooth) / rope.factor + smooth))
    return np.asarray(out, np.float32)


def config_of(tmp_path, case, settings=None, extra=None, **fields) -> DecoderConfig:
    config = dataclasses.replace(CASES[case], **fields)
    plain = Rope(head_dim=config.head_dim, theta=config.rope.theta)
    plain = dataclasses.replace(plain, rotary_dim=config.rope.rotary_dim)
    stored = dataclasses.replace(config, rope=plain)
    path = tmp_path / "model.gguf"
    write_gguf(path, model_of(stored), settings=settings, extra=extra)
    return load_config(path)


def test_rope_of_llama3(tmp_path):
    extra = {"rope_freqs.weight": llama3_factors(LLAMA3)}
    wide = {"rope": LLAMA3, "head_dim": 16, "max_positions": 131072}
    assert config_of(tmp_path, "llama", extra=extra, **wide).rope == LLAMA3
    extra = {"rope_freqs.weight": np.ones(8, np.float32)}
    assert config_of(tmp_path, "llama", extra=extra, **wide).rope.kind == "default"
    extra = {"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}
    with pytest.raises(
        ValueError, match="model.gguf: 'rope_freqs.weight' holds .*Llama"
    ):
        config_of(tmp_path, "llama", extra=extra, **wide)


def test_rope_of_phi3(tmp_path):
    extra = {
        "rope_factors_short.weight": np.asarray([1.5], np.float32),
        "rope_factors_long.weight": np.asarray([3.25], np.float32),
    }
    scale = float(np.sqrt(1 + np.log(4) / np.log(16)))
    said = {
        "phi3.rope.scaling.original_context_length": 16,
        "phi3.rope.scaling.attn_factor": scale,
    }
    assert config_of(tmp_path, "phi3", said, extra, rope=LONG).rope == LONG
    other = said | {"phi3.rope.scaling.attn_factor": 1.5}
    wanted = dataclasses.replace(LONG, attention_factor=1.5)
    assert config_of(tmp_path, "phi3", other, extra, rope=LONG).rope == wanted
    del extra["rope_factors_long.weight"]
    with pytest.raises(ValueError, match="model.gguf has only one of 'rope_factors_sh"):
        config_of(tmp_path, "phi3", said, extra, rope=LONG)


def test_rope_scaling(tmp_path):
    said = {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0}
    said["qwen2.rope.scaling.original_context_length"] = 16
    found = config_of(tmp_path, "qwen2", said)
    wanted = Rope(
        head_dim=4, theta=5e5, kind="yarn", factor=4.0, original_max_positions=16
    )
    assert (found.rope, found.max_positions) == (wanted, 64)
    said = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    found = config_of(tmp_path, "gemma3", said)
    wide = Rope(head_dim=4, theta=1e6, kind="linear", factor=8.0)
    assert (found.rope, found.local_rope) == (wide, Rope(head_dim=4))


def test_windows_of_gemma(tmp_path):
    window = tuple(None if (layer + 1) % 6 == 0 else 8 for layer in range(7))
    deep = {"num_layers": 7, "windows": window}
    assert config_of(tmp_path, "gemma3", **deep).windows == window
    said = {"gemma3.attention.sliding_window_pattern": [True, False, True]}
    assert config_of(tmp_path, "gemma3", said).windows == (8, None, 8)
    said = {"gemma3.attention.sliding_window": None}
    assert config_of(tmp_path, "gemma3", said).windows == ()


def test_end_tokens(tmp_path):
    found = config_of(tmp_path, "llama")
    assert (found.bos_token, found.eos_tokens) == (1, (2, 3))  # and <|im_end|>
    said = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 2**32 - 1}
    assert config_of(tmp_path, "llama", said).eos_tokens == (2, 7, 3)


def test_without_the_library(tmp_path, monkeypatch):
    from kvjax.models.gguf import library

    path = write_gguf(tmp_path / "model.gguf", model_of(CASES["llama"]))
    monkeypatch.setitem(sys.modules, "gguf", None)
    for cached in (library.library, library._readable):
        monkeypatch.setattr(library, cached.__name__, cached.__wrapped__)
    with pytest.raises(ValueError, match=r"pip install kvjax\[gguf\]"):
        load(path)


def test_an_adapter_over_a_file(tmp_path):
    from tests.faults.test_adapters import Q, adapter

    save(model_of(CASES["llama"]), tmp_path / "one")
    write_gguf(tmp_path / "model.gguf", model_of(CASES["llama"]))
    found = []
    for base in ("../one", "../model.gguf"):
        folder = adapter(tmp_path / "one", {Q: 4}, base_model_name_or_path=base)
        found.append(parameters(load(folder, "float32", tokenizer=False)[0]))
    for name, value in found[0].items():
        np.testing.assert_array_equal(found[1][name], value)
    plain = parameters(model_of(CASES["llama"]))["layers.attention.q.kernel"]
    assert not np.array_equal(found[1]["layers.attention.q.kernel"], plain)
