"""GGUF files that are damaged, lie about their sizes or contradict themselves."""

import dataclasses
import os
import pathlib
import struct
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.models import Decoder, load, save
from kvjax.models.io import load_config
from tests.gguf_files import write_gguf
from tests.models.test_gguf import CASES

gguf = pytest.importorskip("gguf", reason="no gguf: pip install kvjax[gguf]")

NAME = "model.gguf"
WIDE = dataclasses.replace(CASES["qwen3"], hidden_size=32)


def fails(path: pathlib.Path, match: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=match) as said:
        load(path, "float32", **options)
    assert NAME in str(said.value) and len(str(said.value)) < 2000


def model(case: str = "llama") -> Decoder:
    return Decoder(CASES[case], dtype=jnp.float32, rngs=nnx.Rngs(0))


@pytest.fixture
def path(tmp_path) -> pathlib.Path:
    return write_gguf(tmp_path / NAME, model())


ODD = (0, 1, 3, 2**16, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1)


def mutant(raw: bytes, header: int, rng: np.random.Generator) -> bytes:
    """A file with one fault of bytes, mostly in what it says of itself."""
    at = int(rng.integers(header if rng.random() < 0.8 else len(raw)))
    match int(rng.integers(8)):
        case 0:
            return raw[:at]
        case 1:
            return raw[:at] + raw[at + int(rng.integers(1, 40)) :]
        case 2:
            return raw[:at] + rng.bytes(int(rng.integers(1, 40))) + raw[at:]
        case 3 | 4:
            byte = bytes([raw[at] ^ (1 << int(rng.integers(8)))])
            return raw[:at] + byte + raw[at + 1 :]
        case 5:
            other = int(rng.integers(header))
            size = int(rng.integers(1, 64))
            return raw[:at] + raw[other : other + size] + raw[at + size :]
    width = (4, 8)[int(rng.integers(2))]
    value = ODD[int(rng.integers(len(ODD)))] % 2 ** (8 * width)
    return raw[:at] + value.to_bytes(width, "little") + raw[at + width :]


def survives(path: pathlib.Path, seed: int, count: int) -> None:
    raw, rng = path.read_bytes(), np.random.default_rng(seed)
    header = raw.rindex(b"output_norm.weight") + 64
    loaded = refused = 0
    for number in range(count):
        path.write_bytes(mutant(raw, header, rng))
        try:
            found, _ = load(path, "float32")
        except ValueError as error:
            assert NAME in str(error), number
            assert len(str(error)) < 2000, number
            refused += 1
        else:
            assert isinstance(found, Decoder)
            loaded += 1
    assert refused > count // 2 and loaded > count // 24


def test_any_damage_gives_a_model_or_names_the_file(path):
    survives(path, seed=0, count=100)


@pytest.mark.slow
@pytest.mark.sweep(0, 0)
def test_a_lot_of_damage_gives_a_model_or_names_the_file(path):
    survives(path, seed=1, count=3000)


def test_every_cut(path):
    """A config alone, since that reads all of the header."""
    raw = path.read_bytes()
    header = raw.rindex(b"output_norm.weight") + 64
    for size in (*range(0, header, 97), header, len(raw) - 1):
        path.write_bytes(raw[:size])
        with pytest.raises(ValueError, match=NAME):
            load_config(path)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def headed(*settings: bytes, tensors: bytes = b"", counts=None, version=3) -> bytes:
    counts = counts or (0, len(settings))
    return (
        b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(settings) + tensors
    )


ARCH = text("general.architecture") + struct.pack("<I", 8) + text("llama")
ROOM = b"\0" * 4096


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", "the first word ends behind the file's 0 bytes"),
        (b"\0" * 4096, r"is no GGUF file: it begins with b'\\x00"),
        (b"GGUF", "the version ends behind"),
        (headed(version=1), "is GGUF of version 1; expected one of"),
        (headed(version=3 << 24), "this one is big-endian"),
        (headed(counts=(2**60, 0)), "more than .* bytes have room for"),
        (headed(counts=(0, 2**63)), "more than .* bytes have room for"),
        (headed(ARCH, ARCH), "the setting 'general.architecture' stands twice"),
        (headed(struct.pack("<Q", 2**62) + ROOM), "name of setting 0 has a length of"),
        (headed(text("a" * 70_000)), "name of setting 0 has a length of 70000"),
        (headed(text("a") + struct.pack("<IQ", 8, 2**63) + ROOM), "`a` has a length"),
        (headed(text("a") + struct.pack("<I", 13) + ROOM), "`a` has the type 13"),
        (headed(text("a") + struct.pack("<IB", 7, 2) + ROOM), "`a` is 2; a bool is"),
        (
            headed(text("a") + struct.pack("<IIQ", 9, 9, 1) + ROOM),
            "`a` is an array of arrays",
        ),
        (
            headed(text("a") + struct.pack("<IIQ", 9, 8, 2**61) + ROOM),
            "`a` has 2305843009213693952 entries, more than the file has room",
        ),
        (
            headed(text("a") + struct.pack("<IIQ", 9, 4, 2**62) + ROOM),
            "`a` has 4611686018427387904 entries",
        ),
        (
            headed(text("a") + struct.pack("<IIQQ", 9, 8, 2, 2**40) + ROOM),
            "`a` ends behind",
        ),
        (headed(text("a") + struct.pack("<IQ", 8, 1) + b"\xff" + ROOM), "not UTF-8"),
        (headed(), "lacks the setting `general.architecture`"),
        (headed(ARCH.replace(b"llama", b"mamba")), "has the architecture 'mamba', wh"),
        (headed(ARCH), "lacks the matrix 'token_embd.weight'"),
    ],
    ids=lambda value: value if isinstance(value, str) else len(value),
)
def test_headers_that_lie(tmp_path, raw, match):
    (tmp_path / NAME).write_bytes(raw)
    fails(tmp_path / NAME, match)


def entry(name: str, sizes: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    numbers = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return text(name) + numbers + struct.pack("<IQ", kind, offset)


ALIGNED = text("general.alignment") + struct.pack("<II", 4, 24)


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ([entry("a", (4,)), entry("a", (4,), 0, 32)], "tensor 'a' stands twice"),
        ([entry("a", ())], "tensor 'a' has 0 axes; expected 1 to 4"),
        ([entry("a", (1,) * 5)], "tensor 'a' has 5 axes"),
        ([entry("a", (4, 0))], r"tensor 'a' has the sizes \[4, 0\]"),
        ([entry("a", (2**40, 2**40))], "tensor 'a' has the sizes"),
        ([entry("a", (2**30,))], "tensor 'a' ends behind the file's"),
        ([entry("a", (4,), 0, 2**63)], "tensor 'a' ends behind the file's"),
        ([entry("a", (4,), 0, 4)], "tensor 'a' begins at 4, no multiple of 32"),
        ([entry("a", (16,)), entry("b", (4,), 0, 32)], "tensors 'a' and 'b' overlap"),
        (
            [entry("a", (4,), 26)],
            "tensor 'a' is of type I32, which is not read; .*Q4_K",
        ),
        ([entry("a", (4,), 999)], "tensor 'a' is of type 999, which is unknown"),
        ([entry("a", (33,), 2)], "'a' is Q4_0, in blocks of 32 numbers, and has rows"),
    ],
)
def test_tensors_that_cannot_be(tmp_path, entries, match):
    raw = headed(ARCH, tensors=b"".join(entries) + ROOM, counts=(len(entries), 1))
    (tmp_path / NAME).write_bytes(raw)
    fails(tmp_path / NAME, match)


def test_an_alignment_that_is_none(tmp_path):
    (tmp_path / NAME).write_bytes(headed(ARCH, ALIGNED) + ROOM)
    fails(tmp_path / NAME, "`general.alignment` is 24; expected a power of two")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"llama.block_count": None}, "lacks the setting `llama.block_count`"),
        ({"llama.block_count": 2**31}, "`llama.block_count` must be an integer"),
        ({"llama.block_count": 20_000}, "`num_hidden_layers` must be"),
        ({"llama.block_count": 4}, "lacks .* tensors .* first"),
        ({"llama.block_count": 2}, "holds .* tensors that 'llama' lacks"),
        ({"llama.block_count": "3"}, "`llama.block_count` must be an integer"),
        ({"llama.embedding_length": 15}, "has shape"),
        ({"llama.embedding_length": 0}, "`llama.embedding_length` must be"),
        ({"llama.attention.head_count": 3}, "heads"),
        ({"llama.attention.head_count_kv": 3}, "heads"),
        ({"llama.attention.head_count_kv": [2, 2, 1]}, "is an array of 3 entries"),
        ({"llama.attention.head_count_kv": [2] * 20_000}, "has 20000 entries"),
        ({"llama.attention.key_length": 8}, "heads of keys have 8 channels"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "must be a finite"),
        ({"llama.vocab_size": 41}, "contradicts itself: 'token_embd.weight' has 40"),
        ({"tokenizer.ggml.tokens": ["a"] * 41}, "and there are 41 tokens"),
        ({"tokenizer.ggml.eos_token_id": 40}, "eos_token_id` is 40, which is no id"),
        ({"llama.expert_count": 8}, r"`llama.expert_count` \(8\) is not read"),
        ({"llama.new_thing": 8}, r"`llama.new_thing` \(8\) is not read"),
        ({"llama.attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"llama.attention.scale": 3.0}, "`llama.attention.scale` is 3.0; expected"),
        ({"llama.rope.dimension_count": 2}, "rotates all channels"),
        ({"llama.rope.dimension_count": 3}, "expected an even number up to the 4"),
        ({"llama.rope.freq_base": -1.0}, "`llama.rope.freq_base` must be"),
        ({"llama.rope.scaling.type": "odd"}, "scaling.type` is 'odd'; expected one"),
        ({"llama.rope.scaling.type": "linear"}, "without a `rope.scaling.factor`"),
        ({"llama.rope.scaling.type": "longrope"}, "is 'longrope', without 'rope_fac"),
        ({"llama.rope.scaling.attn_factor": 2.0}, "attn_factor` is 2.0 beside"),
        ({"split.count": 3}, "is one of 3 parts of a split GGUF"),
        ({"general.alignment": 3}, "`general.alignment` is 3"),
    ],
)
def test_settings_that_contradict_or_are_not_read(tmp_path, settings, match):
    path = tmp_path / NAME
    if "general.alignment" in settings:
        raw = write_gguf(path, model(), settings={"general.number": 32}).read_bytes()
        at = raw.index(b"general.number")
        # The writer refuses to say so itself.
        name = text("general.alignment")
        old = text("general.number") + struct.pack("<II", 4, 32)
        assert raw[at - 8 :].startswith(old)
        path.write_bytes(raw.replace(old, name + struct.pack("<II", 4, 3)))
    else:
        write_gguf(path, model(), settings=settings)
    fails(path, match)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rope_that_is_said_twice(tmp_path, kind):
    said = {"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": 2.0}
    extra = {"rope_freqs.weight": np.ones(2, "f4")}
    path = write_gguf(tmp_path / NAME, model(), settings=said, extra=extra)
    fails(path, f"its RoPE scaling is '{kind}', and its tensors .'rope_freqs.weight'.")
    extra = {"rope_freqs.weight": np.ones(3, "f4")}
    path = write_gguf(tmp_path / NAME, model(), extra=extra)
    fails(path, r"'rope_freqs.weight' has the shape \(3,\); expected \(2,\)")
    extra = {"rope_freqs.weight": np.asarray([1, np.nan], "f4")}
    path = write_gguf(tmp_path / NAME, model(), extra=extra)
    fails(path, "'rope_freqs.weight' holds numbers that are not positive and finite")


def test_gemma_settings_are_refused_by_other_families(tmp_path):
    path = write_gguf(
        tmp_path / NAME, model("qwen2"), settings={"qwen2.attention.sliding_window": 8}
    )
    fails(path, "sliding_window` is 8, and nothing says which layers")


def test_weights_that_are_no_numbers(tmp_path):
    broken = model()
    broken.layers.mlp.up.kernel[...] = (
        broken.layers.mlp.up.kernel[...].at[1].set(jnp.inf)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvjax.models.weights.finite", lambda _: True)
        path = write_gguf(tmp_path / NAME, broken)
    fails(path, "'model.layers.1.mlp.up_proj.weight' in .* holds NaN or Inf")
    kind = gguf.GGMLQuantizationType.Q8_0
    fine = write_gguf(
        tmp_path / NAME,
        Decoder(WIDE, dtype=jnp.float32, rngs=nnx.Rngs(0)),
        lambda name: kind if "token_embd" in name else None,
    )
    found, _ = load(fine, "float32")
    data = gguf.quants.quantize(np.asarray(found.embedding[...]), kind).tobytes()
    raw = fine.read_bytes()
    assert data[:34] in raw
    fine.write_bytes(raw.replace(data[:2], b"\xff\x7f", 1))
    fails(fine, "'model.embed_tokens.weight' in .* holds NaN or Inf")


def test_a_vector_where_a_matrix_is_expected(tmp_path):
    path = write_gguf(tmp_path / NAME, model(), extra={"blk.9.x": np.ones(4, "f4")})
    fails(path, "holds 1 tensors that 'llama' lacks, first .*blk.9.x")


def test_places_that_are_no_file(tmp_path, path):
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(ValueError, match="folder.gguf"):
        load(tmp_path / "folder.gguf")
    with pytest.raises(ValueError, match=r"holds GGUF files: \['model.gguf'\]. Give"):
        load(path.parent)
    with pytest.raises(ValueError, match="nowhere.gguf"):
        load(tmp_path / "nowhere.gguf")
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ValueError, match="pipe.gguf"):
        load(tmp_path / "pipe.gguf")
    part = path.rename(tmp_path / "model-00001-of-00003.gguf")
    with pytest.raises(ValueError, match="is one of '00003' parts of a split GGUF"):
        load(part)
    whole = part.rename(tmp_path / "model-00001-of-00001.gguf")
    found, _ = load(whole, tokenizer=False)
    with pytest.raises(ValueError, match="model-00001-of-00001.gguf.* is a file"):
        save(found, whole)
