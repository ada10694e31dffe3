"""State and batch of a run as shapes: nothing is loaded and nothing computed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from kvjax.models.bundled import shape_of
from kvjax.models.config import DecoderConfig
from kvjax.models.decoder import Decoder
from kvjax.train.data.batch import TokenBatch
from kvjax.train.objectives.passes import ROWS
from kvjax.train.recipe import TrainConfig
from kvjax.train.run.mesh import everywhere, shardings
from kvjax.train.run.model import check_shape, weights_of
from kvjax.train.run.params import Params
from kvjax.train.run.step import TrainState, Weights, init_state


def abstract_shape(config: TrainConfig) -> DecoderConfig:
    """The shape of what a recipe trains; see `kvjax.models.bundled.shape_of`."""
    shape = config.model or shape_of(config.init)
    check_shape(config, shape)
    return shape


def abstract_state(
    config: TrainConfig,
    shape: DecoderConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> tuple[Weights, TrainState]:
    """What a step of the recipe is given beside its batch, on the devices of `mesh`."""
    found: list[Weights] = []

    def made() -> tuple[Params, tuple[Params, Params]]:
        base = Decoder(shape, rngs=nnx.Rngs(0))
        weights, params = weights_of(config, base=base)
        found.append(weights)  # for its structures, which hold no arrays
        return params, weights.arrays

    params, arrays = jax.eval_shape(made)
    fixed, guide = located(arrays, mesh)
    weights = dataclasses.replace(
        found[0], fixed=fixed, guide=guide, mesh=mesh if mesh.size > 1 else None
    )
    state = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    return weights, located(state, mesh)


def located[T](tree: T, mesh: Mesh) -> T:
    """Shapes with the place of each one."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        tree,
        shardings(tree, mesh),
    )


def abstract_batch(rows: int, width: int, mesh: Mesh) -> TokenBatch:
    """A batch whose rows may be compressed anywhere."""

    def struct(dtype: Any, *shape: int) -> Any:
        where = NamedSharding(mesh, ROWS) if shape else everywhere(mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    return TokenBatch(
        tokens=struct(jnp.int32, rows, width),
        weights=struct(jnp.float32, rows, width),
        answers=struct(jnp.bool_, rows, width),
        prompt_lengths=struct(jnp.int32, rows),
        step=struct(jnp.int32),
        later=width,
    )


def hardest(config: TrainConfig) -> TrainConfig:
    """The recipe with each choice at its hardest."""
    choices = tuple(choice.hardest for choice in config.sampling.choices)
    sampling = dataclasses.replace(config.sampling, choices=choices)
    return dataclasses.replace(config, sampling=sampling)
