"""What training minimises: a function of a model and a batch."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from kvjax.attention import causal_attention
from kvjax.compress.config import Compression
from kvjax.models.decoder import Attending, Attention, Decoder
from kvjax.models.simulate import simulated
from kvjax.train import duo
from kvjax.train.data.batch import Batch
from kvjax.train.distillation import PLACES, Watched, distances, watched
from kvjax.train.dms import relaxed
from kvjax.train.mesh import along_rows
from kvjax.train.recipe import ObjectiveConfig, TrainConfig
from kvjax.train.surrogate import regressing
from kvjax.types import pytree

LOGITS = 1 << 28
"""Logits that are held at a time, over all devices: a gibibyte in float32."""


Metrics = dict[str, Array]
Objective = Callable[[Decoder, Batch, Decoder | None], tuple[Array, Metrics]]
"""Loss and metrics of a model, a batch, and the teacher if the loss needs one."""


def make_objective(config: TrainConfig, c: Compression | None = None) -> Objective:
    """The loss of a recipe under one compression.

    Args:
        config: its `objective`, `dms`, `surrogate`, `duo`, `remat` and `loop_layers`
            count. The teacher, which attends to a full cache, comes with the call.
        c: simulated at each row's compression point; None for plain attention.
    """
    weights = config.objective

    def objective(
        model: Decoder, batch: Batch, teacher: Decoder | None = None
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
        aim = (teacher, wanted.last) if weights.distill and wanted else (None, None)
        tokens = said(model, ours.last, batch, *aim)
        loss, metrics = next_token(tokens, batch)
        loss = weights.next_token * loss
        if tokens.apart is not None:
            terms["distill"] = weights.distill, answer_mean(tokens.apart, batch)
        if config.dms is not None:
            terms["shortfall"] = config.dms.weight, ours.state
        if config.surrogate is not None:
            terms["surrogate"] = config.surrogate.weight, ours.state
        if config.duo is not None:  # its teacher is the model itself
            full = pass_of(model, attention=causal_attention)
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
        width = batch.tokens.shape[1]
        how = (batch.prompt_lengths, width, c, batch.later, gradient)
        return simulated(model, *how)
    return causal_attention


def states(
    model: Decoder,
    batch: Batch,
    attention: Attention | Attending = causal_attention,
    *,
    loop: bool = False,
) -> Float[Array, "B T E"]:
    """Hidden states of every token; `loop` compiles equal layers once."""
    rows, width = batch.tokens.shape
    positions = jnp.broadcast_to(jnp.arange(width)[None, :], (rows, width))
    how = {"trained": True, "unroll": not loop, "place": along_rows}
    return model(batch.tokens, positions, attention, **how)


def predictions(
    model: Decoder, batch: Batch, attention: Attention | Attending = causal_attention
) -> Float[Array, "B T-1 V"]:
    """Logits of every token but the first, all at once."""
    return model.logits(states(model, batch, attention))[:, :-1]


@pytree
class Said:
    """What a model says of every token but the first.

    Attributes:
        loss: cross-entropy, `[B, T-1]`, in nats.
        right: whether the token is the likeliest one, `[B, T-1]`.
        apart: KL divergence from the teacher, `[B, T-1]`, in nats; None without one.
    """

    loss: Float[Array, "B T-1"]
    right: Bool[Array, "B T-1"]
    apart: Float[Array, "B T-1"] | None


def said(
    model: Decoder,
    hidden: Float[Array, "B T E"],
    batch: Batch,
    teacher: Decoder | None = None,
    wanted: Float[Array, "B T E"] | None = None,
    *,
    most: int = LOGITS,
) -> Said:
    """Scores of the tokens behind `hidden`; logits are made for some of them at a time.

    Args:
        model: its head is used.
        hidden: its states of every token.
        batch: the tokens.
        teacher: to be compared with, or None.
        wanted: its states.
        most: logits that may be held at a time. Where all of them are fewer, there is
            one chunk; else chunks follow one another, each made again in the backward
            pass.
    """
    rows, width = batch.tokens.shape
    count = -(-rows * width * model.config.vocab_size // most)
    targets = jnp.pad(batch.tokens[:, 1:], [(0, 0), (0, 1)])

    def score(hidden: Array, targets: Array, wanted: Array | None) -> Said:
        logits = model.logits(hidden)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        apart = None
        if teacher is not None and wanted is not None:
            apart = divergence(logits, jax.lax.stop_gradient(teacher.logits(wanted)))
        right = jnp.argmax(logits, axis=-1) == targets
        return Said(loss=loss, right=right, apart=apart)

    if count == 1:
        found = score(hidden, targets, wanted)
    else:
        pieces = jax.tree.map(lambda x: _cut(x, count), (hidden, targets, wanted))
        scan = jax.checkpoint(lambda _, piece: ((), score(*piece)))
        _, found = jax.lax.scan(scan, (), pieces)
        found = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, -1), found)
    return jax.tree.map(lambda x: x[:, : width - 1], found)


def _cut(x: Array, count: int) -> Array:
    """`[B, T, ...]` as `[count, B, t, ...]`, padded behind with zeros."""
    rows, width = x.shape[:2]
    size = -(-width // count)
    x = jnp.pad(x, [(0, 0), (0, count * size - width)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(rows, count, size, *x.shape[2:]), 1, 0)


def divergence(
    logits: Float[Array, "*shape V"], wanted: Float[Array, "*shape V"]
) -> Float[Array, "*shape"]:
    """KL divergence of `logits` from `wanted`, in nats."""
    log_p, log_q = jax.nn.log_softmax(wanted), jax.nn.log_softmax(logits)
    return optax.losses.kl_divergence_with_log_targets(log_q, log_p)


def next_token(tokens: Said, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
    """Weighted mean cross-entropy of the next token, and what to log.

    Returns:
        The loss, and `answer_loss`, `answer_accuracy` over answer tokens and `exact`,
        the share of rows whose answers are right at every token: what greedy decoding
        would give, since it leaves the gold path at its first error.
    """
    weights, answers = batch.weights[:, 1:], batch.answers[:, 1:]
    metrics = {
        "answer_loss": answer_mean(tokens.loss, batch),
        "answer_accuracy": answer_mean(tokens.right.astype(jnp.float32), batch),
        "exact": (tokens.right | ~answers).all(axis=1).mean(),
    }
    total = (tokens.loss * weights).sum() / jnp.maximum(weights.sum(), 1e-6)
    return total, jax.lax.stop_gradient(metrics)


def answer_mean(each: Float[Array, "B T-1"], batch: Batch) -> Float[Array, ""]:
    """Mean over the answer tokens."""
    answers = batch.answers[:, 1:]
    count = jnp.maximum(jnp.sum(answers, dtype=jnp.float32), 1.0)
    return jnp.where(answers, each, 0.0).sum() / count
