"""Quantised weights: FP8 with its scales is read, others are called by their name."""

import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from kvjax.models import load
from kvjax.models.families import read_config
from kvjax.models.quantised import unquantised
from kvjax.models.shards import Shards
from tests.faults.files import NAMES, SINGLE, UP, configure, fails, parts, rewrite
from tests.models.samples import sample

F8 = ml_dtypes.float8_e4m3fn


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32"])
def test_whole_numbers_are_named(one, dtype):
    rewrite(one, lambda held: held.update({UP: np.ones((24, 16), dtype)}))
    fails(one, f"{UP}' in .*{SINGLE} is {NAMES[dtype]}.*unquantised checkpoint")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"quant_method": "gptq", "bits": 4}, "'gptq' with 4 bits.*unquantised"),
        ({"quant_method": "awq", "w_bit": 4}, "'awq' with 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
        ({"load_in_8bit": True}, "'bitsandbytes'"),
        ({"quant_method": "mxfp4"}, "'mxfp4'"),
        ({"quant_method": ["x" * 9000]}, "xxx"),
        ({"bits": 4}, "'None' with 4 bits"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "'modelopt'"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "compressed-tensors of format 'pack-quantized'",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "naive-quantized",
                "config_groups": {
                    "group_0": {"weights": {"type": "int", "num_bits": 8}}
                },
            },
            "compressed-tensors of 8-bit 'int'",
        ),
        ("fp8", "must be a mapping; got fp8"),
    ],
)
def test_ways_of_quantising_are_called_by_their_name(saved, settings, match):
    raw = json.loads((saved / "one/config.json").read_text())
    with pytest.raises(ValueError, match=match) as said:
        read_config(raw | {"quantization_config": settings})
    assert len(str(said.value)) < 500


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("qweight", "GPTQ or AWQ"),
        ("scales", "GPTQ or AWQ"),
        ("weight.absmax", "bitsandbytes"),
        ("weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("weight_packed", "compressed-tensors"),
    ],
)
def test_they_are_known_by_their_tensors(one, name, method):
    whole = UP.removesuffix("weight") + name
    rewrite(one, lambda held: held.update({whole: np.ones((2, 3), "u1")}))
    fails(one, f"{method}.*{whole}' in .*{SINGLE}")


def in_fp8(held: dict[str, Any], block: tuple[int, int] | None, suffix: str) -> None:
    """Quantise every projection, and remember in float32 what it stands for."""
    rng = np.random.default_rng(0)
    for name in [name for name in held if name.endswith("_proj.weight")]:
        value = held[name]
        tall, wide = block or value.shape
        shape = [
            -(-size // step)
            for size, step in zip(value.shape, (tall, wide), strict=True)
        ]
        scale = (0.01 * rng.uniform(1, 2, shape)).astype("f4")
        factors = np.repeat(np.repeat(scale, tall, 0), wide, 1)
        codes = (value / factors[: value.shape[0], : value.shape[1]]).astype(F8)
        held[name] = codes
        held[name + suffix] = scale if block else scale.reshape(())
        held[name.replace("weight", "input_scale")] = np.ones((), "f4")


def expected(
    directory: pathlib.Path, name: str, suffix: str, steps: tuple[int, int] | None
) -> np.ndarray:
    """The values of a quantised tensor, by its file."""
    header, data = parts((directory / SINGLE).read_bytes())
    begin, end = header[name]["data_offsets"]
    shape = header[name]["shape"]
    codes = np.frombuffer(data[begin:end], F8).reshape(shape).astype("f4")
    entry = header[name + suffix]
    begin, end = entry["data_offsets"]
    scale = np.frombuffer(data[begin:end], "f4").reshape(entry["shape"])
    if scale.ndim == 0:
        return codes * scale
    tall, wide = steps or shape
    out = codes.copy()
    for i, row in enumerate(scale):
        for j, factor in enumerate(row):
            out[i * tall : (i + 1) * tall, j * wide : (j + 1) * wide] *= factor
    return out


BLOCK = "weight_block_size"
FINE = {"quant_method": "fp8", "activation_scheme": "dynamic"}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 8}}},
}


@pytest.mark.parametrize(
    ("settings", "block", "suffix"),
    [
        (FINE | {"weight_block_size": [8, 4]}, (8, 4), "_scale_inv"),
        (FINE | {"weight_block_size": [128, 128]}, (128, 128), "_scale_inv"),
        (FINE | {"weight_block_size": None}, None, "_scale_inv"),
        ({"quant_method": "fbgemm_fp8"}, (1, 10**6), "_scale"),
        (COMPRESSED, (1, 10**6), "_scale"),
        (COMPRESSED, None, "_scale"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, None, "_scale"),
        (None, None, "_scale"),
    ],
)
def test_fp8_is_dequantised_with_its_scales(one, monkeypatch, settings, block, suffix):
    monkeypatch.setattr("kvjax.models.shards.CHUNK_BYTES", 80)  # five rows at a time
    rewrite(one, lambda held: in_fp8(held, block, suffix))
    if settings:
        configure(one, quantization_config=settings)
    model, _ = load(one, "float32", tokenizer=False)
    assert model.config == sample("llama").config
    for name, kernel in (("up", model.layers.mlp.up), ("down", model.layers.mlp.down)):
        wanted = expected(one, UP.replace("up_", f"{name}_"), suffix, block)
        np.testing.assert_array_equal(np.asarray(kernel.kernel[1]), wanted.T)
    half, _ = load(one, "bfloat16", tokenizer=False)
    wanted = expected(one, UP, suffix, block).astype(ml_dtypes.bfloat16).T
    np.testing.assert_array_equal(np.asarray(half.layers.mlp.up.kernel[1]), wanted)


def test_scales_that_are_powers_of_two(one):
    """As `scale_fmt: ue8m0` stores them."""

    def edit(held):
        in_fp8(held, None, "_scale_inv")
        for name in [name for name in held if name.endswith("_scale_inv")]:
            held[name] = np.full((), 0.25, ml_dtypes.float8_e8m0fnu)
        held[UP] = np.full((24, 16), 3, F8)

    rewrite(one, edit)
    model, _ = load(one, "float32", tokenizer=False)
    np.testing.assert_array_equal(np.asarray(model.layers.mlp.up.kernel[1]), 0.75)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        ({UP + "_scale": None}, f"{UP}' in .* is FP8 .F8_E4M3. without a scale"),
        ({UP + "_scale_inv": np.ones((), "f4")}, "FP8 .* with two scales"),
        ({UP: np.ones((24, 16), "f4")}, "is F32 and has a scale"),
        ({UP + "_scale": np.ones((16, 1), "f4")}, r"shape \(16, 1\) for a weight of"),
        ({UP + "_scale": np.ones((2, 2), "f4")}, r"or \[1, 1\] .blocks of \[128, 128"),
        ({UP + "_scale": np.ones((0,), "f4")}, r"shape \(0,\) for a weight"),
        ({UP + "_scale": np.full((), np.nan, "f4")}, "_scale' in .* holds NaN or Inf"),
        ({UP + "_scale": np.ones((), "u1")}, "_scale' in .* is U8"),
        ({UP: np.full((24, 16), np.nan, F8)}, f"{UP}' in .* holds NaN or Inf"),
        ({UP + "_scale": np.full((), 3e38, "f4")}, f"{UP}' in .* holds NaN or Inf"),
    ],
)
def test_fp8_that_cannot_be_read(one, edit, match):
    def change(held):
        in_fp8(held, None, "_scale")
        held |= edit
        for name in [name for name, value in held.items() if value is None]:
            del held[name]

    rewrite(one, change)
    fails(one, match)


@pytest.mark.parametrize(
    "block", [[12, 10**30], [10**5000, 4], [True, 4], [12, 4.0], [12], "12", {}]
)
def test_blocks_that_are_none(one, block):
    rewrite(one, lambda held: in_fp8(held, (12, 10**6), "_scale_inv"))
    configure(one, quantization_config=FINE)
    raw = json.loads((one / "config.json").read_text())
    with pytest.raises(ValueError, match="block as two positive integers") as said:
        unquantised(Shards(one), raw | {"quantization_config": {**FINE, BLOCK: block}})
    assert len(str(said.value)) < 500


def test_a_block_wider_than_its_matrix(one):
    """It costs what the matrix is wide."""
    rewrite(one, lambda held: in_fp8(held, (12, 10**6), "_scale_inv"))
    configure(one, quantization_config=FINE | {BLOCK: [12, 2**31 - 1]})
    model, _ = load(one, "float32", tokenizer=False)
    wanted = expected(one, UP, "_scale_inv", (12, 10**6))
    np.testing.assert_array_equal(np.asarray(model.layers.mlp.up.kernel[1]), wanted.T)


def test_fp8_as_a_mere_cast_and_a_config_without_fp8(one):
    rewrite(one, lambda held: held.update({UP: held[UP].astype(F8)}))
    fails(one, "without a scale.*up_proj.weight_scale_inv'.*unquantised")
    configure(one, torch_dtype="float8_e4m3fn")
    load(one, "float32", tokenizer=False)
    rewrite(one, lambda held: held.update({UP: held[UP].astype("f4")}))
    configure(one, quantization_config=FINE)
    fails(one, f"'fp8'.*no tensor in .*{SINGLE} is FP8.*remove `quantization_config`")
