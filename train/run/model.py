"""The model of a run: where training starts, what it adds, and what it trains."""

import dataclasses
import fnmatch
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from kvjax.compress.config import Compression
from kvjax.compress.rolling_check import check_rolling
from kvjax.models import checks
from kvjax.models.adapters import is_adapter
from kvjax.models.bundled import model_directory
from kvjax.models.chunked import Chunking
from kvjax.models.config import DecoderConfig
from kvjax.models.decoder import Decoder
from kvjax.models.evictor import SILENCED, with_evictor
from kvjax.models.hub import checkpoint_directory
from kvjax.models.io import load, load_config
from kvjax.models.projection import with_projection
from kvjax.models.published import fetched
from kvjax.models.sharding import TRAINING
from kvjax.train.data.batch import TokenBatch
from kvjax.train.data.sampling import samples_of
from kvjax.train.objectives import duo
from kvjax.train.objectives.duo import GatedDecoder
from kvjax.train.recipe import TrainConfig
from kvjax.train.run import lora
from kvjax.train.run.lora import with_lora
from kvjax.train.run.mesh import placed
from kvjax.train.run.params import Params, hollow, leaves_of, params_of, split
from kvjax.train.run.step import Weights


def model_shape(config: TrainConfig) -> DecoderConfig:
    """Of the model that a recipe trains."""
    if config.model is not None:
        return config.model
    return load_config(checkpoint_directory(model_directory(config.init)))


def adapter_base(config: TrainConfig) -> str | None:
    """What an adapter of this run is of, as it names it.

    None where training does not start from a checkpoint that an adapter can be of: not
    from fresh weights, and not from another adapter over its own base.
    """
    if not config.init:
        return None
    if is_adapter(checkpoint_directory(model_directory(config.init))):
        return None
    # Where a bundled model is: adapters name directories, hub ids and fetched models.
    is_fetched = fetched(config.init) is not None
    return config.init if is_fetched else model_directory(config.init)


def initial(config: TrainConfig, mesh: Mesh | None = None) -> Decoder:
    """The model that training starts from, in float32, spread over `mesh`."""
    if config.model is not None:
        return Decoder(config.model, rngs=nnx.Rngs(config.seed))
    path, rules = model_directory(config.init), TRAINING
    return load(path, "float32", mesh=mesh, rules=rules, tokenizer=False)[0]


def extended(
    model: Decoder, config: TrainConfig, sample: TokenBatch | None = None
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


def _lengths(sample: TokenBatch) -> Array:
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
    sample: TokenBatch | None = None,
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


def with_ends(model: Decoder, ends: Sequence[int]) -> Decoder:
    """`model` as one that stops at `ends`, too."""
    known = model.config.eos_tokens
    new = tuple(token for token in ends if token not in known)
    if new:
        model.config = dataclasses.replace(model.config, eos_tokens=(*known, *new))
    return model


def check_shape(config: TrainConfig, shape: DecoderConfig) -> None:
    """The recipe can be run on a model of this shape.

    Raises:
        ValueError: rows longer than its range, a compression that asks for what the
            model does not have, a rank above what its matrices have.
    """
    most = shape.max_positions
    widest = max(width for stage in config.stages for width in stage.lengths)
    if widest > most:
        raise ValueError(
            f"`stages` have rows of {widest} tokens; the model's `max_positions` is "
            f"{most}. Take shorter rows, or raise it (with a RoPE scaling that goes "
            "that far) in the model's config."
        )
    gates = ((1.0,) * shape.num_kv_heads,) * shape.num_layers
    trained = dataclasses.replace(
        shape,
        evictor=config.evictor or shape.evictor,
        projection=config.projection or shape.projection,
        head_gates=shape.head_gates or (gates if config.duo else ()),
    )
    for where in ("sampling", "cached"):
        choices = getattr(config, where).choices
        for number, made in enumerate(samples_of(choices, f"{where}.choices")):
            try:
                for one in made:
                    checks.suits(trained, one.compression)
                    if config.chunks is not None and where == "sampling":
                        _check_chunks(config, trained, one.compression, widest)
            except ValueError as wrong:
                raise ValueError(f"{where}.choices[{number}]: {wrong}") from None
    if config.lora is not None:
        lora.check_rank(config.lora, shape)


def _check_chunks(
    config: TrainConfig, shape: DecoderConfig, c: Compression, widest: int
) -> None:
    """What is held can be compressed behind every chunk."""
    check_rolling(c)
    checks.compression(shape, c, jnp.array([widest], jnp.int32))
    how = (c, shape.layers, widest, config.compute)
    Chunking.of(*how)  # which asks for the slots that bytes pay for
