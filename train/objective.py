"""What training minimises: a function of a model and a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from kvjax.attention import causal_attention
from kvjax.compress.config import Compression
from kvjax.models.decoder import Attention, Decoder
from kvjax.models.simulate import simulated
from kvjax.train import duo
from kvjax.train.config import ObjectiveConfig, TrainConfig
from kvjax.train.distillation import PLACES, Watched, distances, watched
from kvjax.train.dms import relaxed
from kvjax.train.surrogate import regressing
from kvjax.types import Lengths, Tokens, pytree, static


@pytree
class Batch:
    """Rows of tokens and how much each one counts as a target.

    Attributes:
        tokens: right-padded token ids, `[B, T]`.
        weights: loss weight of predicting `tokens[:, t]`, `[B, T]`; 0 at padding.
        answers: whether the token belongs to an answer, `[B, T]`.
        prompt_lengths: tokens before the compression point, `[B]`.
        step: of the training, from 0.
        later: no row has more tokens behind its compression point; static.
    """

    tokens: Tokens
    weights: Float[Array, "B T"]
    answers: Array
    prompt_lengths: Lengths
    step: Int[Array, ""]
    later: int = static()


Metrics = dict[str, Array]
Objective = Callable[[Decoder, Batch, Decoder | None], tuple[Array, Metrics]]
"""Loss and metrics of a model, a batch, and the teacher if the loss needs one."""


def make_objective(config: TrainConfig, c: Compression | None = None) -> Objective:
    """The loss of a recipe under one compression.

    Args:
        config: its `objective`, `dms`, `surrogate`, `duo` and `remat` count. The
            teacher, which attends to a full cache, comes with the call.
        c: simulated at each row's compression point; None for plain attention.
    """
    weights = config.objective

    def objective(
        model: Decoder, batch: Batch, teacher: Decoder | None = None
    ) -> tuple[Array, Metrics]:
        attention = _attention(config, c, model, batch)
        ours = watched(model, batch.tokens, attention, weights, remat=config.remat)
        logits = model.logits(ours.last)[:, :-1]
        loss, metrics = next_token(logits, batch)
        loss = weights.next_token * loss
        terms = {}
        if weights.needs_teacher:
            assert teacher is not None
            wanted = watched(teacher, batch.tokens, causal_attention, weights)
            wanted = jax.lax.stop_gradient(wanted)
            terms |= _followed(weights, ours, wanted, batch)
            if weights.distill:
                aim = jax.lax.stop_gradient(teacher.logits(wanted.last)[:, :-1])
                terms["distill"] = weights.distill, distillation(logits, aim, batch)
        if config.dms is not None:
            terms["shortfall"] = config.dms.weight, attention.state
        if config.surrogate is not None:
            terms["surrogate"] = config.surrogate.weight, attention.state
        if config.duo is not None:  # its teacher is the model itself
            full = watched(model, batch.tokens, causal_attention, weights)
            full = jax.lax.stop_gradient(full.last)
            gates = duo.gates_of(model)
            terms |= duo.terms(config.duo, gates, ours.last, full, batch.answers)
        for name, (weight, value) in terms.items():
            loss = loss + weight * value
            metrics[name] = jax.lax.stop_gradient(value)
        return loss, metrics

    return objective


def _followed(
    weights: ObjectiveConfig, ours: Watched, wanted: Watched, batch: Batch
) -> dict[str, tuple[float, Array]]:
    """Weight and value of the terms that compare what two passes computed inside."""
    places = PLACES[weights.tokens](batch.answers, batch.weights, batch.prompt_lengths)
    found = distances(ours, wanted, places)
    return {name: (getattr(weights, name), value) for name, value in found.items()}


def _attention(
    config: TrainConfig, c: Compression | None, model: Decoder, batch: Batch
) -> Any:
    """What the model attends by."""
    if config.duo is not None:
        return duo.mixed(config.duo, duo.gates_of(model))
    if config.dms is not None:
        return relaxed(config.dms, batch.prompt_lengths, batch.step, config.seed)
    if config.surrogate is not None:
        return regressing(batch.prompt_lengths, batch.later)
    if c is not None:
        gradient = config.sampling.choice_gradient
        return simulated(batch.prompt_lengths, c, batch.later, gradient)
    return causal_attention


def predictions(
    model: Decoder,
    batch: Batch,
    attention: Attention = causal_attention,
    *,
    remat: bool = False,
) -> Float[Array, "B T-1 V"]:
    """Logits of every token but the first."""
    rows, width = batch.tokens.shape
    positions = jnp.broadcast_to(jnp.arange(width)[None, :], (rows, width))
    hidden = model(batch.tokens, positions, attention, remat=remat)
    return model.logits(hidden)[:, :-1]


def next_token(
    logits: Float[Array, "B T-1 V"], batch: Batch
) -> tuple[Float[Array, ""], Metrics]:
    """Weighted mean cross-entropy of the next token, and what to log.

    Returns:
        The loss, and `answer_loss`, `answer_accuracy` over answer tokens and `exact`,
        the share of rows whose answers are right at every token: what greedy decoding
        would give, since it leaves the gold path at its first error.
    """
    targets, weights = batch.tokens[:, 1:], batch.weights[:, 1:]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    answers = batch.answers[:, 1:]
    right = jnp.argmax(logits, axis=-1) == targets
    count = jnp.maximum(jnp.sum(answers, dtype=jnp.float32), 1.0)
    metrics = {
        "answer_loss": jnp.where(answers, loss, 0.0).sum() / count,
        "answer_accuracy": jnp.sum(answers & right, dtype=jnp.float32) / count,
        "exact": (right | ~answers).all(axis=1).mean(),
    }
    total = (loss * weights).sum() / jnp.maximum(weights.sum(), 1e-6)
    return total, jax.lax.stop_gradient(metrics)


def distillation(
    logits: Float[Array, "B T-1 V"], wanted: Float[Array, "B T-1 V"], batch: Batch
) -> Float[Array, ""]:
    """Mean KL divergence of `logits` from `wanted` over answer tokens, in nats."""
    answers = batch.answers[:, 1:]
    log_p, log_q = jax.nn.log_softmax(wanted), jax.nn.log_softmax(logits)
    each = optax.losses.kl_divergence_with_log_targets(log_q, log_p)
    count = jnp.maximum(jnp.sum(answers, dtype=jnp.float32), 1.0)
    return jnp.where(answers, each, 0.0).sum() / count
