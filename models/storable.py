"""What can be saved: a whole model of numbers, as its config describes it."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from kvjax.messages import nearest, shown
from kvjax.models import checks
from kvjax.models.arrays import is_traced
from kvjax.models.config import DecoderConfig
from kvjax.models.decoder import Decoder
from kvjax.models.families import family, read_config
from kvjax.models.shards import PLAIN
from kvjax.models.weights import dotted


def storable(model: Any) -> dict[str, Any]:
    """What `config.json` will say of a model that can be saved.

    Values are not looked at here; `write_weights` does, one tensor at a time.

    Raises:
        ValueError: no model, or one that `load` would refuse; names the parameter.
    """
    config = checks.model(model)
    if not isinstance(model, Decoder):
        raise ValueError(
            f"`model` must be a kvjax Decoder; got {shown(type(model).__name__)} with "
            "its configuration. Give the decoder itself."
        )
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    arrays = {dotted(path): leaf.get_value() for path, leaf in flat}
    for path, array in arrays.items():
        _check_array(path, array)
    settings = _settings(config, model.dtype.name)
    _check_parameters(config, arrays)
    return settings


def _check_array(path: str, array: Any) -> None:
    """Numbers that are here, in a dtype that `load` reads."""
    if is_traced(array) or not isinstance(array, jax.Array | np.ndarray):
        raise ValueError(
            f"Parameter {shown(path)} holds no numbers; got {shown(array)}. Save a "
            "model outside of jit, and one that is not abstract (`nnx.eval_shape`)."
        )
    if isinstance(array, jax.Array) and array.is_deleted():
        raise ValueError(
            f"Parameter {shown(path)} was donated to a compiled step, and its numbers "
            "are gone. Save the model that the step gave back."
        )
    if array.dtype.name not in PLAIN:
        raise ValueError(
            f"Parameter {shown(path)} is {array.dtype.name}, which `load` does not "
            f"read; expected one of {list(PLAIN)}. Cast it first."
        )


def _check_parameters(config: DecoderConfig, arrays: dict[str, Any]) -> None:
    """The parameters that the config implies, in its shapes; of a tensor, one dtype."""
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(abstract, nnx.Param))
    wanted = {dotted(path): tuple(leaf.get_value().shape) for path, leaf in flat}
    for path in wanted:
        if path not in arrays:
            raise ValueError(
                f"The model has no parameter {shown(path)}, which its config implies."
                f"{nearest(path, arrays)} Save a whole model."
            )
    for path, array in arrays.items():
        if path not in wanted:
            raise ValueError(
                f"The model has a parameter {shown(path)}, which its config does not "
                f"imply and no {config.family!r} checkpoint holds. Merge or remove it."
            )
        if array.shape != wanted[path]:
            raise ValueError(
                f"Parameter {shown(path)} has shape {array.shape}; the model's config "
                f"implies {wanted[path]}. Mend the weights or the config."
            )
    for name, weight in family(config.family).weights(config).items():
        kinds = {path: arrays[path].dtype.name for path in weight.paths}
        if len({*kinds.values()}) > 1:
            raise ValueError(
                f"{name!r} holds parameters of several dtypes; got {kinds}. Cast them "
                "to one."
            )


def _settings(config: DecoderConfig, dtype: str) -> dict[str, Any]:
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
