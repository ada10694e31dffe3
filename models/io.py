"""Hugging Face checkpoints in and out: `load` and `save`."""

import contextlib
import json
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from kvjax.files import read_json, write_json
from kvjax.messages import nearest, shown
from kvjax.models import sharding
from kvjax.models.adapters import (
    base_directory,
    opened,
    read_tokenizer,
    tokenizer_directory,
)
from kvjax.models.config import DecoderConfig
from kvjax.models.decoder import Decoder
from kvjax.models.families import read_config
from kvjax.models.gguf import gguf_config, is_gguf
from kvjax.models.hub import checkpoint_directory
from kvjax.models.meshes import Placement
from kvjax.models.saving import alone, check_target, clear, contents, move
from kvjax.models.shards import CONFIG, SAVE
from kvjax.models.storable import storable
from kvjax.models.stored_generation import FILE as GENERATION
from kvjax.models.stored_generation import generation_settings, with_generation
from kvjax.models.tokenizer import (
    check_kept,
    check_tokenizer,
    save_tokenizer,
)
from kvjax.models.weights import check_names, dotted, stream_parameters, write_weights
from kvjax.narrow import narrow
from kvjax.places import given_path

_DTYPES = ("bfloat16", "float16", "float32")


@narrow
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
            or the id of one on the Hugging Face hub (`owner/name`); a GGUF file; or a
            model that `kvjax fetch` has fetched, by its name. A LoRA adapter of PEFT is
            merged into the base model that it names.
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
    kind = dtype_of(dtype)
    directory = checkpoint_directory(path_or_hub_id)
    config = load_config(directory)
    source = opened(directory)
    check_names(source, config)  # before anything is built that follows the config
    # Tokenizer first: it is quick, and its absence should not cost a long load.
    words = read_tokenizer(tokenizer_directory(directory)) if tokenizer else None
    if mesh is not None:
        mesh = sharding.automatic(mesh)
        sharding.check_heads(config.num_heads, config.num_kv_heads, mesh, rules)
    abstract = nnx.eval_shape(lambda: Decoder(config, dtype=kind, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    flat = {dotted(path): leaf for path, leaf in nnx.to_flat_state(state)}
    shapes = {path: tuple(leaf.get_value().shape) for path, leaf in flat.items()}
    for path, array in stream_parameters(source, config, shapes, kind, mesh, rules):
        flat[path].set_value(array)
    model = nnx.merge(graphdef, state)
    if mesh is not None:
        model.placement = Placement.of(mesh, rules)
    return model, words


def load_config(directory: str | os.PathLike[str]) -> DecoderConfig:
    """`DecoderConfig` of a checkpoint directory or a GGUF file; weights stay there.

    Raises:
        ValueError: a file that cannot be read, or a setting that is missing, of
            another type, out of range or not supported; names file and setting.
    """
    folder = base_directory(given_path(directory))
    if is_gguf(folder):
        return gguf_config(folder)
    path = folder / CONFIG
    if not os.path.lexists(path) and (files := _gguf_files(folder)):
        raise ValueError(
            f"{folder} has no {CONFIG}, and holds GGUF files: {shown(files)}. Give the "
            "path of one of them."
        )
    raw = read_json(path)
    try:
        config = read_config(raw)
    except ValueError as wrong:
        raise ValueError(f"{path}: {wrong}") from None
    return with_generation(config, folder)


def _gguf_files(folder: pathlib.Path) -> list[str]:
    with contextlib.suppress(OSError, ValueError):  # who reads the config says it
        return sorted(file.name for file in folder.iterdir() if is_gguf(file))
    return []


@narrow
def save(
    model: Decoder, directory: str | os.PathLike[str], tokenizer: Any = None
) -> None:
    """A checkpoint directory that `load` and transformers read.

    All files are written beside their places and moved when they are complete, so a
    full disk leaves what was there before. Weights are moved first and `config.json`
    last; both carry the number of the save (`kvjax_save`), so that `load` refuses what
    a kill between these moves leaves, half of one save and half of another. Of what is
    in the directory, weights that an earlier save placed there are removed, and what
    killed saves have left. A tokenizer replaces the one that is there, chat templates
    included; without one, that stays.

    Raises:
        ValueError: `directory` is a file or holds an adapter, `tokenizer` is none or
            the one that is there has more tokens than the model, `load` would refuse
            the model (NaN, shapes, dtypes), the family cannot store its config, or
            another save is writing there.
        OSError: it cannot be written.
    """
    check_tokenizer(tokenizer)
    settings = storable(model)
    folder = check_target(directory)
    if tokenizer is None:
        check_kept(folder, model.config.vocab_size)
    with alone(folder) as staging:
        empty = [*folder.iterdir()] == [staging]
        try:
            _write(model, settings, staging, tokenizer)
            move(staging, folder, tokenizer=tokenizer is not None)
        except BaseException:
            if empty:
                clear(folder)
            raise


def _write(
    model: Decoder, settings: dict[str, Any], staging: pathlib.Path, tokenizer: Any
) -> None:
    """All files of a save, which reads again."""
    if tokenizer is not None:
        save_tokenizer(tokenizer, staging)
    # The number is of the tokenizer, too: a kill between its files is seen by it.
    text = json.dumps(settings) + (contents(staging) if tokenizer is not None else "")
    write_json(staging / GENERATION, generation_settings(model.config))
    number = write_weights(model, staging, text)
    write_json(staging / CONFIG, {**settings, SAVE: number})
    load_config(staging)


def dtype_of(dtype: Any) -> np.dtype:
    """A dtype that weights can be in.

    Raises:
        ValueError: it is none of them.
    """
    kind = None
    # NumPy parses texts and mappings as structures, and raises what parsers raise.
    with contextlib.suppress(Exception):
        kind = jnp.dtype(dtype)
    if kind is None or kind.name not in _DTYPES:
        hint = nearest(dtype[:40], _DTYPES) if isinstance(dtype, str) else ""
        raise ValueError(
            f"`dtype` must be one of {list(_DTYPES)}; got {shown(dtype)}.{hint}"
        )
    return kind
