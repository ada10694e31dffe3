"""Hugging Face checkpoints in and out: `load` and `save`."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import tempfile
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from kvjax.messages import nearest
from kvjax.models import sharding
from kvjax.models.config import DecoderConfig
from kvjax.models.decoder import Decoder
from kvjax.models.families import family, read_config
from kvjax.models.shards import Shards, read_json
from kvjax.models.tokenizer import load_tokenizer, save_tokenizer
from kvjax.models.weights import dotted, stream_parameters, write_weights

_DTYPES = ("bfloat16", "float16", "float32")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def load(
    path_or_hub_id: str | os.PathLike[str],
    dtype: Any = "bfloat16",
    *,
    mesh: Mesh | None = None,
    rules: sharding.Rules = sharding.RULES,
    tokenizer: bool = True,
) -> tuple[Decoder, Any]:
    """The model and the tokenizer of a checkpoint.

    Args:
        path_or_hub_id: directory with `config.json`, `*.safetensors` and a tokenizer,
            or the id of one on the Hugging Face hub (`owner/name`).
        dtype: of the parameters: `bfloat16`, `float16` or `float32`.
        mesh: devices to place parameters on; None is the default device.
        rules: logical axes to mesh axes, see `models.sharding`.
        tokenizer: False skips the tokenizer and returns None for it.

    Returns:
        `(model, tokenizer)`. Weights stream one parameter of all layers at a time:
        host memory peaks at one such stack above the model.

    Raises:
        ValueError: with the file or tensor at fault, what was expected, and a remedy.
    """
    kind = _dtype(dtype)
    directory = checkpoint_directory(path_or_hub_id)
    config = load_config(directory)
    # Tokenizer first: it is quick, and its absence should not cost a long load.
    words = load_tokenizer(directory) if tokenizer else None
    if mesh is not None:
        mesh = sharding.automatic(mesh)
        sharding.check_heads(config.num_heads, config.num_kv_heads, mesh, rules)
    abstract = nnx.eval_shape(lambda: Decoder(config, dtype=kind, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    flat = {dotted(path): leaf for path, leaf in nnx.to_flat_state(state)}
    shapes = {path: tuple(leaf.get_value().shape) for path, leaf in flat.items()}
    for path, array in stream_parameters(
        Shards(directory), config, shapes, kind, mesh, rules
    ):
        flat[path].set_value(array)
    return nnx.merge(graphdef, state), words


def load_config(directory: str | os.PathLike[str]) -> DecoderConfig:
    """`DecoderConfig` of a checkpoint directory; weights are not touched."""
    folder = pathlib.Path(directory)
    config = read_config(read_json(folder / "config.json"))
    # Chat checkpoints keep their end-of-turn tokens here alone.
    generation = folder / "generation_config.json"
    if generation.is_file():
        eos = read_json(generation).get("eos_token_id")
        if eos is not None:
            stop = tuple(eos) if isinstance(eos, list) else (eos,)
            config = dataclasses.replace(config, eos_tokens=stop)
    return config


def save(
    model: Decoder, directory: str | os.PathLike[str], tokenizer: Any = None
) -> None:
    """A checkpoint directory that `load` and transformers read.

    Written beside its destination first and moved when complete, so a full disk leaves
    what was there before. Weights of an earlier save in `directory` are replaced.

    Raises:
        ValueError: `directory` is a file, or the family cannot store this config.
    """
    folder = pathlib.Path(directory)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; expected a directory to save into.")
    settings = _storable(model.config, jnp.dtype(model.dtype).name)
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    staging = pathlib.Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        _write_json(staging / "config.json", settings)
        _write_json(staging / "generation_config.json", _generation(model.config))
        write_weights(model, staging)
        if tokenizer is not None:
            save_tokenizer(tokenizer, staging)
        _move(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if created:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    staging.rmdir()


def _dtype(dtype: Any) -> np.dtype:
    try:
        kind = jnp.dtype(dtype)
    except TypeError:
        kind = None
    if kind is None or kind.name not in _DTYPES:
        name = str(dtype)
        raise ValueError(
            f"`dtype` must be one of {list(_DTYPES)}; got {name!r}."
            f"{nearest(name, _DTYPES)}"
        )
    return kind


def checkpoint_directory(path_or_hub_id: str | os.PathLike[str]) -> pathlib.Path:
    """The directory of a checkpoint, fetched from the hub where it is an id.

    Raises:
        ValueError: neither a directory nor an id, or it could not be fetched.
    """
    path = pathlib.Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    name = os.fspath(path_or_hub_id)
    if path.exists() or not _HUB_ID.fullmatch(name):
        raise ValueError(
            f"{name!r} is neither a directory nor a hub id of the form 'owner/name'."
        )
    from huggingface_hub import snapshot_download

    try:
        return pathlib.Path(snapshot_download(name, allow_patterns=_PATTERNS))
    # Network, authorisation and name errors share no base class across versions.
    except Exception as error:
        raise ValueError(
            f"{name!r} is not a local directory and could not be fetched from the hub: "
            f"{error}"
        ) from error


def _storable(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    settings = family(config.family).write(config, dtype)
    again = read_config(settings)
    lost = [
        field.name
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(again, field.name)
    ]
    if lost:
        shown = {name: getattr(config, name) for name in lost}
        raise ValueError(f"{config.family!r} checkpoints cannot store {shown}.")
    return settings


def _generation(config: DecoderConfig) -> dict[str, Any]:
    eos: Any = list(config.eos_tokens)
    tokens = {
        "bos_token_id": config.bos_token,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config.pad_token,
    }
    return {key: value for key, value in tokens.items() if value is not None}


def _move(staging: pathlib.Path, folder: pathlib.Path) -> None:
    fresh = {path.name for path in staging.iterdir()}
    for name in sorted(fresh):
        os.replace(staging / name, folder / name)
    for path in folder.glob("model*.safetensors*"):
        if path.name not in fresh:  # shards of an earlier save
            path.unlink()


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
