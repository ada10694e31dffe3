"""What a step is given: rows of tokens as arrays of one width."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.models.padding import pad_rows
from kvjax.train.data.rows import TokenRow
from kvjax.train.data.words import CHARACTERS
from kvjax.types import Lengths, Tokens, pytree, static

LATER = 256
"""`TokenBatch.later` is a multiple of this."""


@pytree
class TokenBatch:
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
    rows: Sequence[TokenRow],
    width: int,
    points: Sequence[int] | None = None,
    step: int = 0,
    pad: int = CHARACTERS.pad,
) -> TokenBatch:
    """Right-padded `[B, width]` arrays; a row that is too long is an error.

    `points` are the rows' compression points; None: behind each context.
    """
    for i, one in enumerate(rows):
        if len(one.tokens) > width:
            raise ValueError(
                f"Row {i} has {len(one.tokens)} tokens, the batch is {width} wide. "
                f"Generate episodes of at most {width - 2} characters."
            )
    tokens, lengths = pad_rows([one.tokens for one in rows], width, fill=pad)
    weights, _ = pad_rows([one.weights for one in rows], width, dtype=np.float32)
    answers, _ = pad_rows([one.answers for one in rows], width, dtype=bool)
    if points is None:
        points = [one.point(0.0, 0.0) for one in rows]
    later = int((lengths - np.asarray(points, np.int32)).max())
    return TokenBatch(
        tokens=jnp.asarray(tokens),
        weights=jnp.asarray(weights),
        answers=jnp.asarray(answers),
        prompt_lengths=jnp.asarray(points, jnp.int32),
        step=jnp.asarray(step, jnp.int32),
        # A multiple, since every value compiles a program.
        later=min(width, -(-later // LATER) * LATER),
    )
