"""A run as a recipe says it: model, data, compressions, optimizer, loop."""

import fnmatch
import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array

from kvjax.models.bundled import model_directory
from kvjax.models.config import DecoderConfig
from kvjax.models.decoder import Decoder
from kvjax.models.evictor import SILENCED, with_evictor
from kvjax.models.io import checkpoint_directory, load, load_config, save
from kvjax.models.projection import with_projection
from kvjax.models.sharding import TRAINING
from kvjax.train import lora, processes
from kvjax.train.data import Mixture
from kvjax.train.data.batch import Batch
from kvjax.train.data.sampling import check_choices
from kvjax.train.data.share import WHOLE
from kvjax.train.data.words import Words, words_of
from kvjax.train.directory import claimed
from kvjax.train.held_out.batches import held_out_batches
from kvjax.train.held_out.cached import CachedEvaluation
from kvjax.train.logs import check_writers
from kvjax.train.loop import Progress, TrainState, Weights, train
from kvjax.train.lora import merged, with_lora
from kvjax.train.mesh import check_mesh, make_mesh, placed, share_of
from kvjax.train.objectives import duo
from kvjax.train.objectives.duo import GatedDecoder, exported
from kvjax.train.params import Params, hollow, leaves_of, params_of, split, with_params
from kvjax.train.recipe import TrainConfig
from kvjax.train.stored import writing


def _shape(config: TrainConfig) -> DecoderConfig:
    if config.model is not None:
        return config.model
    return load_config(checkpoint_directory(model_directory(config.init)))


def initial(config: TrainConfig, mesh: Mesh | None = None) -> Decoder:
    """The model that training starts from, in float32, spread over `mesh`."""
    if config.model is not None:
        return Decoder(config.model, rngs=nnx.Rngs(config.seed))
    path, rules = model_directory(config.init), TRAINING
    return load(path, "float32", mesh=mesh, rules=rules, tokenizer=False)[0]


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
    config: TrainConfig,
    sample: Batch | None = None,
    *,
    base: Decoder | None = None,
    mesh: Mesh | None = None,
) -> tuple[Weights, Params]:
    """Model, teacher and fixed weights of a run, and the weights that it trains.

    Weights that stay as they are take the dtype of the passes; the teacher has them
    from there, so that there is one copy of them.

    Args:
        config: the recipe.
        sample: rows for what starts from data.
        base: the model that training starts from; None: the recipe's.
        mesh: devices to spread the weights over; None: one.
    """
    base = initial(config, mesh) if base is None else base
    model = extended(base, config, sample)
    params, fixed = split(params_of(model), _trained(config))
    fixed = {name: x.astype(config.compute) for name, x in fixed.items()}
    teacher = base if config.objective.needs_teacher else None
    guide = {} if teacher is None else _apart(teacher, fixed, config)
    if mesh is not None:
        params, fixed, guide = placed((params, fixed, guide), mesh)
    weights = Weights(
        model=hollow(model),
        fixed=fixed,
        teacher=None if teacher is None else hollow(teacher),
        guide=guide,
        compute=config.compute,
        mesh=mesh,
    )
    return weights, params


def _apart(teacher: Decoder, fixed: Params, config: TrainConfig) -> Params:
    """The teacher's weights that `fixed` does not have."""
    neuron = config.evictor is not None and config.evictor.kind == "neuron"
    silenced = SILENCED if neuron else ()  # the teacher still has those channels
    return {
        name: jnp.array(x, config.compute)
        for name, x in leaves_of(teacher).items()
        if name not in fixed or any(fnmatch.fnmatch(name, one) for one in silenced)
    }


def check_widths(config: TrainConfig, most: int) -> None:
    """Rows fit a model of `most` positions, or a `ValueError` says what to do."""
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
        ValueError: a directory of another recipe or of another run that still goes
            on; see `kvjax.train.loop.train`.
        OSError: a checkpoint, a line of the log or the model cannot be written; the
            checkpoints that are complete are named.
    """
    check_writers(config.log)
    check_choices(config)
    shape = _shape(config)
    check_mesh(config, shape, jax.device_count())
    check_widths(config, shape.max_positions)
    alone = config.mesh.devices == jax.process_count() == 1
    mesh = None if alone else make_mesh(config.mesh)
    words = words_of(config)
    mixture = Mixture(
        config.data,
        config.stages,
        config.seed,
        config.sampling.visible,
        words,
        WHOLE if mesh is None else share_of(mesh),
    )
    # All rows of it: every process has to start from the same weights.
    sample = None if config.projection is None else mixture.batch(0, WHOLE)
    weights, params = weights_of(config, sample, mesh=mesh)
    cached = CachedEvaluation(config, weights.model.config, words, mixture.held_out)
    with claimed(directory, config):
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
        target = directory / "model"
        with writing("the model", target, directory / "checkpoints"):
            _export(weights, state, words, target)
    return state


def _export(
    weights: Weights, state: TrainState, words: Words, directory: pathlib.Path
) -> None:
    stored = {**weights.fixed, **state.params}
    model = exported(with_params(weights.model, stored))
    model = merged(with_params(model, params_of(model, "bfloat16")))
    if jax.process_count() > 1:
        whole = functools.partial(multihost_utils.process_allgather, tiled=True)
        model = with_params(model, jax.tree.map(whole, leaves_of(model)))
    if processes.first():
        save(model, directory)
        words.save(directory, model.config.max_positions)
    processes.barrier("exported")
