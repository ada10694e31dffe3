"""Rows of several lengths as one array, and the widths that arrays have."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kvjax.types import Tokens

PROMPT = 64
"""Widths of prompts are multiples of it (docs/architecture.md, "The state")."""


def bucket(tokens: int, least: int = 16) -> int:
    """Width that `tokens` are padded to: four sizes per octave, multiples of `least`.

    Bounds the number of compilations under any mix of lengths.
    """
    step = max(least, 1 << max(0, (tokens - 1).bit_length() - 3))
    return -(-tokens // step) * step


def widest(tokens: int) -> int:
    """The longest prompt that programs and caches are no larger for."""
    # Programs are as wide as one bucket, caches have the slots of the other.
    return min(bucket(tokens), bucket(tokens, PROMPT))


def pad_tokens(tokens: Tokens, width: int) -> Int[Array, "B W"]:
    """Right-pad with token 0."""
    return jnp.pad(tokens, [(0, 0), (0, width - tokens.shape[1])])


def pad_rows(
    rows: Sequence[Any],
    width: int | None = None,
    *,
    fill: int = 0,
    dtype: Any = "int32",
) -> tuple[np.ndarray, np.ndarray]:
    """`[B, width]` with `fill` behind each row, and the rows' lengths `[B]`.

    Args:
        rows: sequences of numbers, none longer than `width`.
        width: None: that of the longest.
        fill: what stands where a row has ended.
        dtype: of the array.
    """
    lengths = np.array([len(row) for row in rows], np.int32)
    shape = (len(rows), int(lengths.max()) if width is None else width)
    out = np.full(shape, fill, dtype)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out, lengths
