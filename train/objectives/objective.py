"""What training minimises: a function of a model and a batch."""

import functools
from collections.abc import Callable

import jax
from jaxtyping import Array

from kvjax.attention import causal_attention
from kvjax.compress.config import Compression
from kvjax.models.decoder import Attending, Attention, Decoder
from kvjax.models.simulate import simulated
from kvjax.train.data.batch import TokenBatch
from kvjax.train.objectives import duo
from kvjax.train.objectives.chunked import chunked_scores
from kvjax.train.objectives.distillation import PLACES, distances, in_context
from kvjax.train.objectives.dms import relaxed
from kvjax.train.objectives.losses import (
    Metrics,
    answer_mean,
    mean_over,
    next_token,
    token_scores,
)
from kvjax.train.objectives.passes import Watched, plain_states, watched
from kvjax.train.objectives.surrogate import regressing
from kvjax.train.recipe import ObjectiveConfig, TrainConfig

Objective = Callable[[Decoder, TokenBatch, Decoder | None], tuple[Array, Metrics]]
"""Loss and metrics of a model, a batch, and the teacher if the loss needs one."""


def make_objective(config: TrainConfig, c: Compression | None = None) -> Objective:
    """The loss of a recipe under one compression.

    Args:
        config: its `objective`, `dms`, `surrogate`, `duo`, `chunks`, `remat` and
            `loop_layers` count. The teacher, which attends to a full cache, comes with
            the call.
        c: simulated at each row's compression point, or behind every chunk; None for
            plain attention.
    """
    if config.chunks is not None:
        return _in_chunks(config, c)
    weights = config.objective

    def objective(
        model: Decoder, batch: TokenBatch, teacher: Decoder | None = None
    ) -> tuple[Array, Metrics]:
        attention = _attention(config, c, model, batch)
        pass_of = functools.partial(
            watched, tokens=batch.tokens, config=weights, loop=config.loop_layers
        )
        ours = pass_of(model, attention=attention, remat=config.remat)
        terms, wanted = {}, None
        if weights.needs_teacher:
            assert teacher is not None
            wanted = pass_of(teacher, attention=causal_attention)
            wanted = jax.lax.stop_gradient(wanted)
            terms |= _followed(weights, ours, wanted, batch)
        aim, context = (None, None), None
        if wanted and weights.compares_logits:
            aim = teacher, wanted.last
        if weights.distill_context:
            width = batch.tokens.shape[1]
            context = in_context(batch.prompt_lengths, width, batch.step)
        tokens = token_scores(model, ours.last, batch, *aim, context)
        loss, metrics = next_token(tokens, batch)
        loss = weights.next_token * loss
        if tokens.apart is not None:
            terms["distill"] = weights.distill, answer_mean(tokens.apart, batch)
        if tokens.apart is not None and context is not None:
            apart = mean_over(tokens.apart, context)
            terms["distill_context"] = weights.distill_context, apart
        if config.dms is not None:
            terms["shortfall"] = config.dms.weight, ours.state
        if config.surrogate is not None:
            terms["surrogate"] = config.surrogate.weight, ours.state
        if config.duo is not None:  # its teacher is the model itself
            full = plain_states(model, batch.tokens, loop=config.loop_layers)
            full = jax.lax.stop_gradient(full)
            gates = duo.gates_of(model)
            terms |= duo.terms(config.duo, gates, ours.last, full, batch.answers)
        for name, (weight, value) in terms.items():
            loss = loss + weight * value
            metrics[name] = jax.lax.stop_gradient(value)
        return loss, metrics

    return objective


def _in_chunks(config: TrainConfig, c: Compression | None) -> Objective:
    """The loss of rows that are read in chunks."""
    weights = config.objective

    def objective(
        model: Decoder, batch: TokenBatch, teacher: Decoder | None = None
    ) -> tuple[Array, Metrics]:
        wanted = None
        if weights.distill:
            assert teacher is not None
            wanted = plain_states(teacher, batch.tokens, loop=config.loop_layers)
        aim = (None, None) if wanted is None else (teacher, wanted)
        tokens = chunked_scores(config, c, model, batch, *aim)
        loss, metrics = next_token(tokens, batch)
        loss = weights.next_token * loss
        if tokens.apart is not None:
            apart = answer_mean(tokens.apart, batch)
            loss = loss + weights.distill * apart
            metrics["distill"] = jax.lax.stop_gradient(apart)
        return loss, metrics

    return objective


def _followed(
    weights: ObjectiveConfig, ours: Watched, wanted: Watched, batch: TokenBatch
) -> dict[str, tuple[float, Array]]:
    """Weight and value of the terms that compare what two passes computed inside."""
    places = PLACES[weights.tokens](batch.answers, batch.weights, batch.prompt_lengths)
    found = distances(ours, wanted, places)
    return {name: (getattr(weights, name), value) for name, value in found.items()}


def _attention(
    config: TrainConfig, c: Compression | None, model: Decoder, batch: TokenBatch
) -> Attention | Attending:
    """What the model attends by."""
    if config.duo is not None:
        return duo.mixed(config.duo, duo.gates_of(model))
    if config.dms is not None:
        return relaxed(config.dms, batch.prompt_lengths, batch.step, config.seed)
    if config.surrogate is not None:
        return regressing(batch.prompt_lengths, batch.later)
    if c is not None:
        gradient = config.sampling.choice_gradient
        rows = (batch.prompt_lengths, batch.tokens)
        return simulated(model, *rows, c, batch.later, gradient)
    return causal_attention
