"""Weights between checkpoint tensors and decoder parameters, one at a time."""

import hashlib
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from kvjax.messages import nearest
from kvjax.models import sharding
from kvjax.models.config import DecoderConfig
from kvjax.models.decoder import Decoder
from kvjax.models.families import Weight, family
from kvjax.models.shards import (
    CHUNK_BYTES,
    INDEX,
    SINGLE,
    Source,
    finite,
    mark,
    write_safetensors,
)

SHARD_BYTES = 5 * 10**9
_ALIGNMENT = 64
_HEAD = "lm_head.weight"
# Buffers of old checkpoints that follow from the config.
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")


def dotted(path: tuple[Any, ...]) -> str:
    """`layers.mlp.up.kernel` of an NNX path."""
    return ".".join(str(part) for part in path)


def stream_parameters(
    shards: Source,
    config: DecoderConfig,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    mesh: Mesh | None,
    rules: sharding.Rules,
) -> Iterator[tuple[str, jax.Array]]:
    """Each parameter on its devices, of all layers together."""
    weights = family(config.family).weights(config)
    sources: dict[str, list[tuple[str, tuple[int, int]]]] = {}
    for name, weight in weights.items():
        parts = [_own(shapes[path], weight) for path in weight.paths]
        _check_shape(name, shards.files[name], shards.shapes[name], parts, weight)
        start = 0
        for path, shape in zip(weight.paths, parts, strict=True):
            stop = start + (shape[-1] if weight.transpose else shape[0])
            sources.setdefault(path, []).append((name, (start, stop)))
            start = stop
    for path, pieces in sources.items():
        shape = shapes[path]
        where = sharding.parameter_sharding(path, shape, mesh, rules) if mesh else None
        host = _aligned(shape, dtype)
        for name, rows in pieces:
            weight = weights[name]
            target = host if weight.layer is None else host[weight.layer]
            _read(shards, name, rows, target.T if weight.transpose else target)
        yield path, sharding.place(host, where)
        del host, target
    if config.tie_embeddings and _HEAD in shards.shapes:
        _check_tied(shards)


def _own(shape: tuple[int, ...], weight: Weight) -> tuple[int, ...]:
    """Of a parameter's shape, what one tensor fills."""
    return shape if weight.layer is None else shape[1:]


def _read(shards: Source, name: str, rows: tuple[int, int], target: np.ndarray) -> None:
    """Rows of a tensor into memory that is there, in its dtype."""
    dtype, done = target.dtype, 0
    for piece in shards.rows(name, *rows):
        if not finite(piece):
            raise ValueError(
                f"Tensor {name!r} in {shards.files[name]} holds NaN or Inf. The "
                f"checkpoint is damaged or its training diverged."
            )
        with np.errstate(over="ignore"):
            piece = piece.astype(dtype, copy=False)
        if not finite(piece):
            wider = dtype.itemsize < 4 and dtype.name != "bfloat16"
            remedy = (
                "Load it as 'bfloat16' or 'float32'." if wider else "It is damaged."
            )
            raise ValueError(
                f"Tensor {name!r} in {shards.files[name]} overflows {dtype.name}. "
                f"{remedy}"
            )
        target[done : done + len(piece)] = piece
        done += len(piece)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory that JAX on a CPU takes over without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def check_names(shards: Source, config: DecoderConfig) -> None:
    """The checkpoint holds the tensors that the config implies, and no others.

    Raises:
        ValueError: tensors are missing, or left over.
    """
    weights = family(config.family).weights(config)
    missing = [name for name in weights if name not in shards.shapes]
    if missing:
        if missing == [_HEAD]:
            raise ValueError(
                f"{shards.place} has no {_HEAD!r}, and config.json does not tie the "
                f"head to the embedding. If the model's head is its embedding, set "
                f"`tie_word_embeddings` to true in config.json; otherwise the head was "
                f"lost: save or download the checkpoint again."
            )
        hint = nearest(missing[0], shards.shapes)
        raise ValueError(
            f"{shards.place} lacks {len(missing)} of {len(weights)} tensors that "
            f"config.json implies, first {_shown(missing)}.{hint:.200}"
        )
    known = {*weights, *([_HEAD] if config.tie_embeddings else [])}
    extra = [
        name
        for name in shards.shapes
        if name not in known and not _DERIVED.fullmatch(name)
    ]
    if extra:
        raise ValueError(
            f"{shards.place} holds {len(extra)} tensors that {config.family!r} lacks, "
            f"first {_shown(sorted(extra))} in {shards.files[min(extra)]}. Its "
            f"config.json does not describe it."
        )


def _shown(names: list[str]) -> list[str]:
    return [name[:120] for name in names[:3]]


def _check_shape(
    name: str,
    file: pathlib.Path,
    got: tuple[int, ...],
    parts: list[tuple[int, ...]],
    weight: Weight,
) -> None:
    stored = [shape[::-1] if weight.transpose else shape for shape in parts]
    expected = (sum(shape[0] for shape in stored), *stored[0][1:])
    if got != expected:
        raise ValueError(
            f"Tensor {name!r} has shape {str(got):.120} in {file}; config.json implies "
            f"{expected}."
        )


def _check_tied(shards: Source) -> None:
    """A tied checkpoint may store its head too, if it is the embedding."""
    names = ("model.embed_tokens.weight", _HEAD)
    shape = shards.shapes[names[0]]
    step = max(1, CHUNK_BYTES // (8 * shape[1]))  # of the widest dtype, for both
    same = shards.shapes[names[1]] == shape and all(
        np.array_equal(
            _rows(shards, names[0], first, step), _rows(shards, names[1], first, step)
        )
        for first in range(0, shape[0], step)
    )
    if not same:
        raise ValueError(
            f"config.json ties the head to the embedding, but {_HEAD!r} in "
            f"{shards.files[_HEAD]} differs from it. Set `tie_word_embeddings` to "
            f"false."
        )


def _rows(shards: Source, name: str, first: int, count: int) -> np.ndarray:
    stop = min(first + count, shards.shapes[name][0])
    pieces = [piece.astype(np.float64) for piece in shards.rows(name, first, stop)]
    return np.concatenate(pieces)


def write_weights(model: Decoder, folder: pathlib.Path, of: str) -> str:
    """The model's weights as one safetensors file, or shards and their index.

    Returns:
        The number of the save, which is in the header of each: a digest of the weights
        and of the text `of`, so that one model is always saved as the same bytes.

    Raises:
        ValueError: a weight is not finite.
    """
    total = hashlib.sha256(of.encode())
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    arrays = {dotted(path): leaf.get_value() for path, leaf in flat}
    weights = family(model.config.family).weights(model.config)
    tensors = {}
    for name, weight in weights.items():
        parts = [_own(arrays[path].shape, weight) for path in weight.paths]
        stored = [part[:: -1 if weight.transpose else 1] for part in parts]
        shape = (sum(part[0] for part in stored), *stored[0][1:])
        tensors[name] = (shape, jnp.dtype(arrays[weight.paths[0]].dtype))

    def pieces(name: str) -> Iterator[np.ndarray]:
        return _stored(name, weights[name], arrays)

    groups = _group(tensors)
    count = len(groups)
    table = {}
    for number, names in enumerate(groups, 1):
        file = (
            SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        )
        some = {n: tensors[n] for n in names}
        write_safetensors(folder / file, some, pieces, total)
        table |= dict.fromkeys(names, file)
    if count > 1:
        size = sum(_size(*tensor) for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": table}
        text = json.dumps(index, indent=2) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")
    number = total.hexdigest()[:16]
    for file in dict.fromkeys(table.values()):
        mark(folder / file, number)
    return number


def _stored(
    name: str, weight: Weight, arrays: Mapping[str, Any]
) -> Iterator[np.ndarray]:
    """A tensor's rows, a few megabytes at a time, if they are finite."""
    for path in weight.paths:
        held = arrays[path]
        host = _host(held if weight.layer is None else held[weight.layer])
        rows = host.T if weight.transpose else host
        step = max(1, CHUNK_BYTES // max(rows[:1].nbytes, 1))
        for first in range(0, len(rows), step):
            if not finite(piece := rows[first : first + step]):
                raise ValueError(
                    f"Tensor {name!r} of the model holds NaN or Inf, which `load` "
                    "refuses: its training diverged, or it is damaged. Nothing was "
                    "saved; save a state from before."
                )
            yield piece


def _group(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    held = 0
    for name, tensor in tensors.items():
        size = _size(*tensor)
        if groups[-1] and held + size > SHARD_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def _size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return int(np.prod(shape)) * dtype.itemsize


def _host(array: jax.Array | np.ndarray) -> np.ndarray:
    """A host view or copy that goes away with its last user."""
    if isinstance(array, np.ndarray):
        return array
    if not array.is_fully_addressable:
        raise ValueError(
            "`save` needs every shard of the parameters in this process; gather them "
            "first, for instance with `jax.experimental.multihost_utils`."
        )
    on_host = all(device.platform == "cpu" for device in array.devices())
    # A device array keeps the host copy it once made; a throwaway keeps it no longer.
    return np.asarray(array if on_host else jnp.copy(array))
