"""What a step is given: rows of tokens as arrays of one width."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.train.data.rows import Row
from kvjax.train.data.words import CHARACTERS
from kvjax.types import Lengths, Tokens, pytree, static

LATER = 256
"""`Batch.later` is a multiple of this."""


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


def pack(
    rows: Sequence[Row],
    width: int,
    points: Sequence[int] | None = None,
    step: int = 0,
    pad: int = CHARACTERS.pad,
) -> Batch:
    """Right-padded `[B, width]` arrays; a row that is too long is an error.

    `points` are the rows' compression points; None: behind each context.
    """
    tokens = np.full((len(rows), width), pad, np.int32)
    weights = np.zeros((len(rows), width), np.float32)
    answers = np.zeros((len(rows), width), bool)
    for i, one in enumerate(rows):
        n = len(one.tokens)
        if n > width:
            raise ValueError(
                f"Row {i} has {n} tokens, the batch is {width} wide. Generate "
                f"episodes of at most {width - 2} characters."
            )
        tokens[i, :n], weights[i, :n] = one.tokens, one.weights
        answers[i, :n] = one.answers
    if points is None:
        points = [one.point(0.0, 0.0) for one in rows]
    arrays = (tokens, weights, answers, np.asarray(points, np.int32), np.int32(step))
    names = ("tokens", "weights", "answers", "prompt_lengths", "step")
    later = max(len(one.tokens) - at for one, at in zip(rows, points, strict=True))
    fields = dict(zip(names, map(jnp.asarray, arrays), strict=True))
    # A multiple, since every value compiles a program.
    return Batch(**fields, later=min(width, -(-later // LATER) * LATER))
