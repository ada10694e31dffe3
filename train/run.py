"""A run as a recipe says it: model, data, compressions, optimizer, loop."""

import functools
import pathlib

from flax import nnx

from kvjax.models.bundled import model_directory
from kvjax.models.decoder import Decoder
from kvjax.models.io import load
from kvjax.train.config import TrainConfig
from kvjax.train.data import Mixture
from kvjax.train.evaluate import held_out_batches
from kvjax.train.loop import TrainState, train
from kvjax.train.optimizer import make_optimizer
from kvjax.train.sampling import Sampler


def initial(config: TrainConfig) -> Decoder:
    """The model that training starts from, in float32."""
    if config.model is not None:
        return Decoder(config.model, rngs=nnx.Rngs(config.seed))
    return load(model_directory(config.init), "float32", tokenizer=False)[0]


def run(config: TrainConfig, directory: pathlib.Path) -> TrainState:
    """Train what `config` says, or go on where `directory` stands."""
    sampling = config.sampling
    mixture = Mixture(config.data, config.stages, config.seed, sampling.visible)
    return train(
        initial(config),
        config.objective,
        make_optimizer(config.optimizer, config.steps),
        mixture.batches,
        steps=config.steps,
        directory=directory,
        sampler=Sampler(sampling, config.seed),
        held_out=functools.partial(held_out_batches, config),
        log_every=config.log_every,
        eval_every=config.eval_every,
        save_every=config.save_every,
    )
