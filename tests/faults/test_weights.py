"""Weights that are damaged, doubled, missing or of other kinds than expected."""

import json
import pathlib
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kvjax.models import Decoder, load
from tests.faults.files import (
    HEAD,
    INDEX,
    NORM,
    SINGLE,
    UP,
    configure,
    fails,
    framed,
    parts,
    rewrite,
)


def mutant(raw: bytes, rng: np.random.Generator) -> bytes:
    """A file with one fault: of bytes, or of what the header says."""
    size = int.from_bytes(raw[:8], "little")
    at = int(rng.integers((8, 8 + size, len(raw))[int(rng.integers(3))]))
    match int(rng.integers(6)):
        case 0:
            return raw[:at]
        case 1:
            return raw[:at] + raw[at + int(rng.integers(1, 40)) :]
        case 2:
            return raw[:at] + rng.bytes(int(rng.integers(1, 40))) + raw[at:]
        case 3 | 4:
            byte = bytes([raw[at] ^ (1 << int(rng.integers(8)))])
            return raw[:at] + byte + raw[at + 1 :]
    header, data = parts(raw)
    names = [name for name in header if name != "__metadata__"]
    name, other = (names[int(i)] for i in rng.integers(len(names), size=2))
    odd = (-1, 0, 1, 2**31, 2**60, 2**63, 2**70, 1.5, "1", None, [], {})
    value = odd[int(rng.integers(len(odd)))]
    match int(rng.integers(6)):
        case 0:
            header[name]["shape"] = [value, *header[name]["shape"][1:]]
        case 1:
            header[name]["data_offsets"][int(rng.integers(2))] = value
        case 2:
            header[name]["dtype"] = ("F16", "F64", "I8", "F8_E4M3", "X", value)[at % 6]
        case 3:
            header[name]["shape"] = ([], [0], header[name]["shape"][::-1], value)[
                at % 4
            ]
        case 4:
            header[name] = header[other]
        case _:
            header[name + "x"] = header.pop(name)
    return framed(json.dumps(header).encode(), data)


def survives(one: pathlib.Path, seed: int, count: int) -> None:
    raw, rng = (one / SINGLE).read_bytes(), np.random.default_rng(seed)
    loaded = refused = 0
    for number in range(count):
        (one / SINGLE).write_bytes(mutant(raw, rng))
        try:
            model, _ = load(one, "float32", tokenizer=False)
        except ValueError as error:
            assert SINGLE in str(error), number
            assert len(str(error)) < 2000, number
            refused += 1
        else:
            assert isinstance(model, Decoder)
            loaded += 1
    assert refused > count // 2 and loaded > count // 24


def test_any_damage_gives_a_model_or_names_the_file(one):
    survives(one, seed=0, count=120)


@pytest.mark.slow
@pytest.mark.sweep(0, 0)
def test_a_lot_of_damage_gives_a_model_or_names_the_file(one):
    survives(one, seed=1, count=2500)


@pytest.mark.parametrize(
    ("length", "match"),
    [(2**60, "header too large"), (2**63, "header too large"), (0, "safetensors file")],
)
def test_impossible_header_lengths(one, length, match):
    raw = (one / SINGLE).read_bytes()
    (one / SINGLE).write_bytes(struct.pack("<Q", length) + raw[8:])
    fails(one, f"{SINGLE} is not a complete.*{match}")


def test_offsets_that_overlap_or_leave_holes(one):
    raw = (one / SINGLE).read_bytes()
    header, data = parts(raw)
    names = sorted(name for name in header if name != "__metadata__")
    for shift in (-4, 4):
        wrong = {k: v for k, v in header.items() if k != "__metadata__"}
        begin, end = wrong[names[3]]["data_offsets"]
        moved = [begin + shift, end + shift]
        wrong = wrong | {names[3]: wrong[names[3]] | {"data_offsets": moved}}
        (one / SINGLE).write_bytes(framed(json.dumps(wrong).encode(), data))
        fails(one, f"{SINGLE} is not a complete.*offset.*model")


def test_a_header_that_names_a_tensor_twice(one):
    header, data = parts((one / SINGLE).read_bytes())
    text, again = json.dumps(header), json.dumps({NORM: header[NORM]})
    twice = text[:-1] + ", " + again[1:]
    (one / SINGLE).write_bytes(framed(twice.encode(), data))
    fails(one, f"{SINGLE} is not a complete.*'{NORM}' stands twice")


def test_a_tensor_in_two_shards(many):
    index = json.loads((many / INDEX).read_text())["weight_map"]
    other = next(file for file in index.values() if file != index[NORM])
    held = load_file(many / other)
    save_file(held | {NORM: np.ones(16, "f4")}, many / other)
    fails(many, rf"Tensor '{NORM}' is in .*{other} and in .*{index[NORM]}")
    table = {name: file for name, file in index.items() if name != NORM}
    (many / INDEX).write_text(json.dumps({"weight_map": table}))
    fails(many, f"Tensor '{NORM}' is in .*model-0.*model-0")


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ([], "no `weight_map` from tensors"),
        ({}, "no `weight_map` from tensors"),
        ("x" * 10_000, "no `weight_map` from tensors"),
        ({NORM: None}, "names None; shards must lie"),
        ({NORM: ["a"]}, r"names \['a'\]; shards must lie"),
        ({NORM: {"a": "b" * 10_000}}, "names {'a': 'bbb.*; shards must lie"),
        ({NORM: ""}, "names ''; shards must lie"),
        ({NORM: "config.json"}, "config.json is not a complete safetensors file"),
    ],
)
def test_an_index_of_wrong_types(many, table, match):
    (many / INDEX).write_text(json.dumps({"weight_map": table}))
    fails(many, match)


def test_an_index_that_names_a_tensor_twice(many):
    text = (many / INDEX).read_text()
    place = f'"weight_map": {{"{NORM}": "model-00001-of-00002.safetensors",'
    (many / INDEX).write_text(text.replace('"weight_map": {', place))
    fails(many, f"{INDEX} is not JSON.*'{NORM}' stands twice")


@pytest.mark.parametrize("shape", [(), (0,), (0, 16), (16, 0), (16, 1), (1, 1, 16)])
def test_tensors_of_other_ranks(one, shape):
    rewrite(one, lambda held: held.update({NORM: np.ones(shape, "f4")}))
    fails(one, rf"{NORM}' has shape .* in .*{SINGLE}; config.json implies \(16,\)")


def test_a_head_that_is_not_there(one):
    embedding = load_file(one / SINGLE)["model.embed_tokens.weight"]
    rewrite(one, lambda held: held.pop(HEAD))
    fails(one, f"{SINGLE} has no '{HEAD}'.*`tie_word_embeddings` to true")
    configure(one, tie_word_embeddings=True)
    model, _ = load(one, "float32", tokenizer=False)
    np.testing.assert_array_equal(model.embedding[...], embedding)


def test_float64_is_cast(one):
    wide = load_file(one / SINGLE)[UP].astype("f8") + 1e-12
    rewrite(one, lambda held: held.update({UP: wide}))
    for dtype in ("float32", "bfloat16"):
        model, _ = load(one, dtype, tokenizer=False)
        found = np.asarray(model.layers.mlp.up.kernel[1])
        np.testing.assert_array_equal(found, wide.T.astype(found.dtype))
    for value, said in ((np.nan, "holds NaN or Inf"), (1e300, "overflows float32")):
        rewrite(one, lambda held, value=value: held.update({UP: wide * 0 + value}))
        fails(one, f"{UP}' in .*{SINGLE} {said}")


@pytest.mark.parametrize("kinds", [("f4", "f8"), ("f8", "f4"), ("f2", "f4")])
def test_a_tied_head_in_another_dtype(one, monkeypatch, kinds):
    """In pieces of rows, of which the wider dtype has fewer in each chunk."""
    monkeypatch.setattr("kvjax.models.shards.CHUNK_BYTES", 300)
    monkeypatch.setattr("kvjax.models.weights.CHUNK_BYTES", 700)
    configure(one, tie_word_embeddings=True)
    name = "model.embed_tokens.weight"
    table = load_file(one / SINGLE)[name].astype("f2")
    held = {name: table.astype(kinds[0]), HEAD: table.astype(kinds[1])}
    rewrite(one, lambda tensors: tensors.update(held))
    load(one, "float32", tokenizer=False)
    held[HEAD][-1, -1] += 1
    rewrite(one, lambda tensors: tensors.update(held))
    fails(one, "ties the head .* differs")
