"""What a model says of each token, and the losses made of that."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from kvjax.models.decoder import Decoder
from kvjax.train.data.batch import TokenBatch
from kvjax.types import pytree

LOGITS = 1 << 28
"""Logits that are held at a time, over all devices: a gibibyte in float32."""

PIECES = 8
"""Into how many pieces tokens are put that may count or not."""

FEW = 1 << 22
"""Logits that are all made, whether or not their tokens count."""

Metrics = dict[str, Array]


@pytree
class TokenScores:
    """What a model says of every token but the first.

    Attributes:
        loss: cross-entropy, `[B, T-1]`, in nats.
        right: whether the token is the likeliest one, `[B, T-1]`.
        apart: KL divergence from the teacher, `[B, T-1]`, in nats; None without one.
    """

    loss: Float[Array, "B T-1"]
    right: Bool[Array, "B T-1"]
    apart: Float[Array, "B T-1"] | None


def token_scores(
    model: Decoder,
    hidden: Float[Array, "B T E"],
    batch: TokenBatch,
    teacher: Decoder | None = None,
    wanted: Float[Array, "B T E"] | None = None,
    also: Bool[Array, "B T-1"] | None = None,
    *,
    most: int = LOGITS,
) -> TokenScores:
    """Scores of the tokens behind `hidden`; logits are made for some of them at a time.

    Where there are more than `FEW` logits, those of tokens that neither are an answer
    nor have a weight are hardly made: the tokens that count go in front, and a piece
    without any is left out. In a row of a task they are a few of a thousand.

    Args:
        model: its head is used.
        hidden: its states of every token.
        batch: the tokens.
        teacher: to be compared with, or None.
        wanted: its states.
        also: what counts beside answers and tokens with a weight.
        most: logits that may be held at a time. Where all of them are fewer, there is
            one piece; else pieces follow one another, each made again in the backward
            pass.

    Returns:
        The scores; of tokens that do not count, 0 or what they are.
    """
    targets = jnp.pad(batch.tokens[:, 1:], [(0, 0), (0, 1)])
    if targets.size * model.config.vocab_size <= min(FEW, most):
        found = scores_of(model, hidden, targets, teacher, wanted, most=most)
        return jax.tree.map(lambda x: x[:, :-1], found)
    counted = ((batch.weights > 0) | batch.answers)[:, 1:]
    counted = jnp.pad(counted if also is None else counted | also, [(0, 0), (0, 1)])
    order = jnp.argsort(~counted, axis=1, stable=True)
    ours, targets, counted, wanted = jax.tree.map(
        lambda x: _taken(x, order), (hidden, targets, counted, wanted)
    )
    found = scores_of(model, ours, targets, teacher, wanted, counted, most=most)
    back = jnp.argsort(order, axis=1)
    return jax.tree.map(lambda x: _taken(x, back)[:, :-1], found)


def scores_of(
    model: Decoder,
    hidden: Float[Array, "B T E"],
    targets: Int[Array, "B T"],
    teacher: Decoder | None = None,
    wanted: Float[Array, "B T E"] | None = None,
    counted: Bool[Array, "B T"] | None = None,
    *,
    most: int = LOGITS,
) -> TokenScores:
    """`token_scores` for targets that are given, `[B, T]` of everything.

    With `counted`, those that count in front, pieces without any are 0.
    """
    rows, width = targets.shape
    count = -(-rows * width * model.config.vocab_size // most)
    if counted is not None:
        count = max(count, PIECES)

    def score(hidden: Array, targets: Array, wanted: Array | None) -> TokenScores:
        logits = model.logits(hidden)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        apart = None
        if teacher is not None and wanted is not None:
            apart = divergence(logits, jax.lax.stop_gradient(teacher.logits(wanted)))
        right = jnp.argmax(logits, axis=-1) == targets
        return TokenScores(loss=loss, right=right, apart=apart)

    if count == 1:
        return score(hidden, targets, wanted)

    def piece_of(x: tuple, counted: Array | None) -> TokenScores:
        if counted is None:
            return score(*x)
        nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(score, *x))
        return jax.lax.cond(counted.any(), lambda: score(*x), lambda: nothing)

    everything = ((hidden, targets, wanted), counted)
    pieces = jax.tree.map(lambda x: _cut(x, count), everything)
    scan = jax.checkpoint(lambda _, piece: ((), piece_of(*piece)))
    _, found = jax.lax.scan(scan, (), pieces)
    found = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, -1), found)
    return jax.tree.map(lambda x: x[:, :width], found)


def _taken(x: Array, order: Int[Array, "B T"]) -> Array:
    """`[B, T, ...]` with every row in its order."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), 1)


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


def next_token(
    tokens: TokenScores, batch: TokenBatch
) -> tuple[Float[Array, ""], Metrics]:
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


def answer_mean(each: Float[Array, "B T-1"], batch: TokenBatch) -> Float[Array, ""]:
    """Mean over the answer tokens."""
    return mean_over(each, batch.answers[:, 1:])


def mean_over(
    each: Float[Array, "B T-1"], places: Bool[Array, "B T-1"]
) -> Float[Array, ""]:
    """Mean over `places`; 0 where there are none."""
    count = jnp.maximum(jnp.sum(places, dtype=jnp.float32), 1.0)
    return jnp.where(places, each, 0.0).sum() / count
