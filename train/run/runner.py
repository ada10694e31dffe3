"""A run as a recipe says it: model, data, compressions, optimizer, loop."""

import functools
import logging
import pathlib
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils

from kvjax.models.adapter_writing import Updates, fused, save_adapter
from kvjax.models.config import DecoderConfig
from kvjax.models.io import save
from kvjax.narrow import narrow
from kvjax.train.data import Mixture
from kvjax.train.data.sampling import check_choices
from kvjax.train.data.share import WHOLE
from kvjax.train.data.words import Words, words_of
from kvjax.train.held_out.batches import held_out_batches
from kvjax.train.held_out.cached import CachedEvaluation
from kvjax.train.objectives.duo import exported
from kvjax.train.recipe import TrainConfig
from kvjax.train.run import processes
from kvjax.train.run.directory import Claim, check_directory, claimed
from kvjax.train.run.exported import ADAPTER, MODEL, begin_export, end_export
from kvjax.train.run.logs import check_log, check_writers
from kvjax.train.run.loop import train
from kvjax.train.run.lora import merged, updates_of
from kvjax.train.run.mesh import check_mesh, make_mesh, share_of
from kvjax.train.run.model import (
    adapter_base,
    check_shape,
    model_shape,
    weights_of,
    with_ends,
)
from kvjax.train.run.params import leaves_of, params_of, with_params
from kvjax.train.run.progress import StepProgress
from kvjax.train.run.step import TrainState, Weights
from kvjax.train.run.stored import writing

LOG = logging.getLogger("kvjax.train")


@narrow
def run(
    config: TrainConfig,
    directory: pathlib.Path,
    *,
    progress: Callable[[StepProgress], None] | None = None,
) -> TrainState:
    """Train what `config` says, or go on where `directory` stands.

    The finished model is saved in `directory / "model"`, in bfloat16, with the
    tokenizer of the model that training started from; the recipe in `recipe.yaml`.
    Where LoRA's updates of a checkpoint are all that was trained, they alone are in
    `directory / "adapter"`, in PEFT's layout.

    Args:
        config: the recipe.
        directory: of the run.
        progress: told of each step.

    Raises:
        ValueError: a directory that is not this run's, see
            `kvjax.train.run.directory.claimed`, or whose log is damaged; see
            `kvjax.train.run.loop.train`.
        OSError: a checkpoint, a line of the log or the model cannot be written; the
            checkpoints that are complete are named.
    """
    check_directory(directory)
    check_writers(config.log)
    check_choices(config)
    shape = model_shape(config)
    check_mesh(config, shape, jax.device_count())
    check_shape(config, shape)
    with claimed(directory, config) as claim:
        check_log(directory)
        return _claimed(config, claim, progress)


def _claimed(
    config: TrainConfig,
    claim: Claim,
    progress: Callable[[StepProgress], None] | None,
) -> TrainState:
    """`run`, in a directory that no other run writes to."""
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
    ends = _new_ends(mixture, weights.model.config)
    cached = CachedEvaluation(config, weights.model.config, words, mixture.held_out)
    claim.begin()
    state = train(
        weights,
        params,
        config,
        mixture.batches,
        directory=claim.directory,
        held_out=functools.partial(held_out_batches, config, mixture),
        cached=cached,
        progress=progress,
    )
    target = claim.directory / MODEL
    with writing("the model", target, claim.directory / "checkpoints"):
        _export(config, weights, state, words, ends, target)
    return state


def _new_ends(mixture: Mixture, shape: DecoderConfig) -> tuple[int, ...]:
    """Tokens that answers are trained to end with, at which the model did not stop."""
    new = tuple(end for end in mixture.ends if end not in shape.eos_tokens)
    if new and processes.first():
        names = mixture.words.tokenizer.convert_ids_to_tokens(list(new))
        LOG.warning(
            "answers end with %s, which is not among the model's end tokens %s; the "
            "trained model gets it there, to stop at it",
            ", ".join(f"{n} ({t})" for n, t in zip(names, new, strict=True)),
            [*shape.eos_tokens],
        )
    return new


def _export(
    config: TrainConfig,
    weights: Weights,
    state: TrainState,
    words: Words,
    ends: tuple[int, ...],
    directory: pathlib.Path,
) -> None:
    stored = {**weights.fixed, **state.params}
    model = exported(with_params(weights.model, stored))
    updates = {} if config.lora is None else updates_of(model)
    model = merged(with_params(model, params_of(model, "bfloat16")))
    if jax.process_count() > 1:
        whole = functools.partial(multihost_utils.process_allgather, tiled=True)
        model = with_params(model, jax.tree.map(whole, leaves_of(model)))
        updates = jax.tree.map(whole, updates)
    if processes.first():
        begin_export(directory.parent)
        if config.only_lora and (base := adapter_base(config)):
            assert config.lora is not None
            shape, where = model.config, directory.parent / ADAPTER
            _export_adapter(base, config.lora.alpha, shape, updates, where)
        save(with_ends(model, ends), directory)
        words.save(directory, model.config.max_positions)
        end_export(directory.parent)
    processes.barrier("exported")


def _export_adapter(
    base: str,
    alpha: float,
    shape: DecoderConfig,
    updates: Updates,
    directory: pathlib.Path,
) -> None:
    """The updates alone, where checkpoints of the family store these matrices."""
    if parts := fused(shape, list(updates)):
        LOG.warning(
            "%s stores %s within other matrices: there is no adapter, and the merged "
            "model has everything",
            shape.family,
            parts,
        )
        return
    save_adapter(directory, shape, updates, base=base, alpha=alpha)
