"""A run as a recipe says it: model, data, compressions, optimizer, loop."""

import functools
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx

from kvjax.models.bundled import model_directory
from kvjax.models.decoder import Decoder
from kvjax.models.evictor import with_evictor
from kvjax.models.io import load, save
from kvjax.train.config import TrainConfig
from kvjax.train.data import Mixture
from kvjax.train.evaluate import held_out_batches
from kvjax.train.loop import TrainState, train, with_params
from kvjax.train.optimizer import make_optimizer
from kvjax.train.tokenizer import save_tokenizer


def initial(config: TrainConfig) -> Decoder:
    """The model that training starts from, in float32."""
    if config.model is not None:
        return Decoder(config.model, rngs=nnx.Rngs(config.seed))
    return load(model_directory(config.init), "float32", tokenizer=False)[0]


def trained(model: Decoder, config: TrainConfig) -> Decoder:
    """`model` with what training adds to it."""
    if config.evictor is None:
        return model
    return with_evictor(model, config.evictor, seed=config.seed)


def run(config: TrainConfig, directory: pathlib.Path) -> TrainState:
    """Train what `config` says, or go on where `directory` stands.

    The finished model is saved in `directory / "model"`, in bfloat16, with the
    tokenizer of the model that training started from.
    """
    mixture = Mixture(config.data, config.stages, config.seed, config.sampling.visible)
    teacher = initial(config)
    model = trained(teacher, config)
    state = train(
        model,
        config,
        make_optimizer(config.optimizer, config.steps),
        mixture.batches,
        directory=directory,
        teacher=teacher if config.objective.distill else None,
        held_out=functools.partial(held_out_batches, config),
    )
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params)
    save(with_params(model, params), directory / "model")
    save_tokenizer(directory / "model", model.config.max_positions)
    return state
