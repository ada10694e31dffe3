"""Hugging Face checkpoints in and out: `load` and `save`."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from kvjax.files import read_json, write_json
from kvjax.messages import nearest, shown
from kvjax.models import sharding
from kvjax.models.adapters import base_directory, opened, tokenizer_directory
from kvjax.models.config import DecoderConfig
from kvjax.models.decoder import Decoder
from kvjax.models.families import family, read_config
from kvjax.models.hub import checkpoint_directory
from kvjax.models.shards import CONFIG, INDEX, SAVE, placed
from kvjax.models.stored_generation import FILE as GENERATION
from kvjax.models.stored_generation import generation_settings, with_generation
from kvjax.models.tokenizer import check_tokenizer, load_tokenizer, save_tokenizer
from kvjax.models.weights import check_names, dotted, stream_parameters, write_weights
from kvjax.narrow import narrow
from kvjax.places import held

_DTYPES = ("bfloat16", "float16", "float32")
STAGING = ".saving-"


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
            or the id of one on the Hugging Face hub (`owner/name`). A LoRA adapter of
            PEFT is merged into the base model that it names.
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
    source = opened(directory)
    check_names(source, config)  # before anything is built that follows the config
    # Tokenizer first: it is quick, and its absence should not cost a long load.
    words = load_tokenizer(tokenizer_directory(directory)) if tokenizer else None
    if mesh is not None:
        mesh = sharding.automatic(mesh)
        sharding.check_heads(config.num_heads, config.num_kv_heads, mesh, rules)
    abstract = nnx.eval_shape(lambda: Decoder(config, dtype=kind, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    flat = {dotted(path): leaf for path, leaf in nnx.to_flat_state(state)}
    shapes = {path: tuple(leaf.get_value().shape) for path, leaf in flat.items()}
    for path, array in stream_parameters(source, config, shapes, kind, mesh, rules):
        flat[path].set_value(array)
    return nnx.merge(graphdef, state), words


def load_config(directory: str | os.PathLike[str]) -> DecoderConfig:
    """`DecoderConfig` of a checkpoint directory; weights are not touched.

    Raises:
        ValueError: a file that cannot be read, or a setting that is missing, of
            another type, out of range or not supported; names file and setting.
    """
    folder = base_directory(_path(directory))
    path = folder / CONFIG
    raw = read_json(path)
    try:
        config = read_config(raw)
    except ValueError as wrong:
        raise ValueError(f"{path}: {wrong}") from None
    return with_generation(config, folder)


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
    killed saves have left.

    Raises:
        ValueError: `directory` is a file, `tokenizer` is none, the family cannot store
            this config, or another save is writing there.
        OSError: it cannot be written.
    """
    folder = _path(directory)
    check_tokenizer(tokenizer)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; expected a directory to save into.")
    settings = _storable(model.config, jnp.dtype(model.dtype).name)
    created = not folder.exists()
    try:
        with _alone(folder) as staging:
            write_json(staging / GENERATION, generation_settings(model.config))
            number = write_weights(model, staging, json.dumps(settings))
            write_json(staging / CONFIG, {**settings, SAVE: number})
            if tokenizer is not None:
                save_tokenizer(tokenizer, staging)
            _move(staging, folder)
    except BaseException:
        if created:
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder inside of `folder` for the files of the only save there."""
    with held(folder) as mine:
        if not mine:
            raise ValueError(
                f"another process is saving to {folder}. Wait for it, or save "
                "elsewhere."
            )
        for left in folder.glob(f"{STAGING}*"):
            shutil.rmtree(left, ignore_errors=True)
        staging = pathlib.Path(tempfile.mkdtemp(prefix=STAGING, dir=folder))
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _move(staging: pathlib.Path, folder: pathlib.Path) -> None:
    """Everything to its place; see `save` for the order."""
    old = placed(folder)
    fresh = sorted(staging.iterdir(), key=lambda path: (_rank(path.name), path.name))
    for path in fresh:
        _on_disk(path)
    names = {path.name for path in fresh}
    weights = [path for path in fresh if _rank(path.name) == 0]
    for path in weights:
        os.replace(path, folder / path.name)
    for path in old:
        if path.name not in names:
            path.unlink(missing_ok=True)
    for path in fresh[len(weights) :]:
        if path.is_dir():  # of further chat templates
            shutil.rmtree(folder / path.name, ignore_errors=True)
        os.replace(path, folder / path.name)


def _rank(name: str) -> int:
    """Weights and what names them, what goes with them, and the config."""
    if name.endswith(".safetensors") or name == INDEX:
        return 0
    return 2 if name == CONFIG else 1


def _on_disk(path: pathlib.Path) -> None:
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _path(directory: Any) -> pathlib.Path:
    if not isinstance(directory, str | os.PathLike):
        raise ValueError(f"Expected the path of a directory; got {shown(directory)}.")
    return pathlib.Path(directory)


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


def _storable(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    settings = family(config.family).write(config, dtype)
    again = read_config(settings)
    lost = [
        field.name
        for field in dataclasses.fields(config)
        if field.compare and getattr(config, field.name) != getattr(again, field.name)
    ]
    if lost:
        values = {name: getattr(config, name) for name in lost}
        raise ValueError(f"{config.family!r} checkpoints cannot store {values}.")
    return settings
