"""A run as a recipe says it: model, data, compressions, optimizer, loop."""

import functools
import pathlib
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from kvjax.models.bundled import model_directory
from kvjax.models.decoder import Decoder
from kvjax.models.evictor import with_evictor
from kvjax.models.io import load, save
from kvjax.models.projection import with_projection
from kvjax.train import duo, lora
from kvjax.train.cached import CachedEvaluation
from kvjax.train.config import TrainConfig
from kvjax.train.data import Mixture
from kvjax.train.duo import GatedDecoder, exported
from kvjax.train.evaluate import held_out_batches
from kvjax.train.logs import check_writers
from kvjax.train.loop import Progress, TrainState, Weights, train
from kvjax.train.lora import merged, with_lora
from kvjax.train.objective import Batch
from kvjax.train.params import Params, params_of, split, with_params
from kvjax.train.recipe import claim
from kvjax.train.words import words_of


def initial(config: TrainConfig) -> Decoder:
    """The model that training starts from, in float32."""
    if config.model is not None:
        return Decoder(config.model, rngs=nnx.Rngs(config.seed))
    return load(model_directory(config.init), "float32", tokenizer=False)[0]


def extended(
    model: Decoder, config: TrainConfig, sample: Batch | None = None
) -> Decoder:
    """`model` with what training adds to it; `sample` is for what starts from data."""
    if config.evictor is not None:
        model = with_evictor(model, config.evictor, seed=config.seed)
    if config.projection is not None:
        tokens = None if sample is None else sample.tokens
        lengths = None if sample is None else _lengths(sample)
        model = with_projection(model, config.projection, tokens, lengths)
    if config.lora is not None:
        model = with_lora(model, config.lora, seed=config.seed)
    return model if config.duo is None else GatedDecoder(model)


def _lengths(sample: Batch) -> Array:
    """Tokens of each row, up to the last one that counts."""
    counts = jnp.flip(sample.weights > 0, axis=1)
    return sample.tokens.shape[1] - jnp.argmax(counts, axis=1).astype(jnp.int32)


def _trained(config: TrainConfig) -> tuple[str, ...]:
    """Patterns of what is trained; none: all."""
    sides = config.projection.sides if config.projection else ()
    return (
        *(lora.PATTERNS if config.lora else ()),
        *(duo.PATTERNS if config.duo else ()),
        *(f"*.{side}_basis" for side in sides),
        *config.trainable,
    )


def weights_of(
    config: TrainConfig, sample: Batch | None = None
) -> tuple[Weights, Params]:
    """Model, teacher and fixed weights of a run, and the weights that it trains.

    Weights that stay as they are take the dtype of the passes; the teacher shares them.
    """
    base = initial(config)
    model = extended(base, config, sample)
    params, fixed = split(params_of(model), _trained(config))
    fixed = {name: x.astype(config.compute) for name, x in fixed.items()}
    teacher = base if config.objective.needs_teacher else None
    guide = {}
    if teacher is not None:
        own = params_of(teacher, config.compute)
        guide = {name: fixed.get(name, x) for name, x in own.items()}
        if config.evictor is not None and config.evictor.kind == "neuron":
            guide = own  # its borrowed channels are still there
    weights = Weights(
        model=model,
        fixed=fixed,
        teacher=teacher,
        guide=guide,
        compute=config.compute,
    )
    return weights, params


def _check_widths(config: TrainConfig, most: int) -> None:
    widest = max(width for stage in config.stages for width in stage.lengths)
    if widest > most:
        raise ValueError(
            f"`stages` have rows of {widest} tokens; the model's `max_positions` is "
            f"{most}. Take shorter rows, or raise it (with a RoPE scaling that goes "
            "that far) in the model's config."
        )


def run(
    config: TrainConfig,
    directory: pathlib.Path,
    *,
    progress: Callable[[Progress], None] | None = None,
) -> TrainState:
    """Train what `config` says, or go on where `directory` stands.

    The finished model is saved in `directory / "model"`, in bfloat16, with the
    tokenizer of the model that training started from; the recipe in `recipe.yaml`.

    Args:
        config: the recipe.
        directory: of the run.
        progress: told of each step.

    Raises:
        ValueError: a directory of another recipe; see `kvjax.train.loop.train`.
        OSError: a checkpoint or the model cannot be written; those before are kept.
    """
    check_writers(config.log)
    words = words_of(config)
    visible = config.sampling.visible
    mixture = Mixture(config.data, config.stages, config.seed, visible, words)
    sample = None if config.projection is None else mixture.batch(0)
    weights, params = weights_of(config, sample)
    _check_widths(config, weights.model.config.max_positions)
    cached = CachedEvaluation(config, weights.model.config, words)
    claim(directory, config)
    state = train(
        weights,
        params,
        config,
        mixture.batches,
        directory=directory,
        held_out=functools.partial(held_out_batches, config, mixture),
        cached=cached,
        progress=progress,
    )
    stored = {**weights.fixed, **state.params}
    model = exported(with_params(weights.model, stored))
    model = with_params(model, params_of(model, "bfloat16"))
    save(merged(model), directory / "model")
    words.save(directory / "model", model.config.max_positions)
    return state
