"""What training minimises: a function of a model and a batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from kvjax.models.decoder import Attention, Decoder
from kvjax.train.attention import prefix_attention
from kvjax.types import Tokens, pytree


@pytree
class Batch:
    """Rows of tokens and how much each one counts as a target.

    Attributes:
        tokens: right-padded token ids, `[B, T]`.
        weights: loss weight of predicting `tokens[:, t]`, `[B, T]`; 0 at padding.
        answers: whether the token belongs to an answer, `[B, T]`.
    """

    tokens: Tokens
    weights: Float[Array, "B T"]
    answers: Array


Objective = Callable[[Decoder, Batch], tuple[Array, dict[str, Array]]]


def next_token_loss(
    model: Decoder, batch: Batch, *, attention: Attention = prefix_attention
) -> tuple[Array, dict[str, Array]]:
    """Weighted mean cross-entropy of the next token, and what to log.

    Returns:
        The loss, and `answer_loss`, `answer_accuracy` over answer tokens and `exact`,
        the share of rows whose answers are right at every token: what greedy decoding
        would give, since it leaves the gold path at its first error.
    """
    rows, width = batch.tokens.shape
    positions = jnp.broadcast_to(jnp.arange(width)[None, :], (rows, width))
    logits = model.logits(model(batch.tokens, positions, attention))[:, :-1]
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
