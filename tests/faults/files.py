"""Checkpoints whose files a test edits, down to the bytes."""

import json
import pathlib
import struct
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.models import load

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM, HEAD = "model.norm.weight", "lm_head.weight"
UP = "model.layers.1.mlp.up_proj.weight"
NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int8": "I8",
    "uint8": "U8",
    "int32": "I32",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
}


def fails(directory: pathlib.Path, match: str, dtype: str = "float32") -> None:
    with pytest.raises(ValueError, match=match) as said:
        load(directory, dtype, tokenizer=False)
    assert len(str(said.value)) < 2000


def written(tensors: dict[str, np.ndarray]) -> bytes:
    """A safetensors file, 8-bit floats included."""
    header, data = {}, b""
    for name, value in tensors.items():
        raw = value.tobytes()
        header[name] = {
            "dtype": NAMES[value.dtype.name],
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return framed(json.dumps(header).encode(), data)


def framed(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def rewrite(directory: pathlib.Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit the tensors of an unsharded checkpoint in place."""
    header, data = parts((directory / SINGLE).read_bytes())
    kinds = {kind: name for name, kind in NAMES.items()}
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            raw = np.frombuffer(data[begin:end], jnp.dtype(kinds[entry["dtype"]]))
            tensors[name] = raw.reshape(entry["shape"])
    edit(tensors)
    (directory / SINGLE).write_bytes(written(tensors))


def configure(directory: pathlib.Path, **settings: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def parts(raw: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]
