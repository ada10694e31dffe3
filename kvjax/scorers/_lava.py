"""LAVa: attention that the last queries pay, times the largest value of the head."""

import dataclasses
from typing import final

import jax.numpy as jnp
from jaxtyping import Array

from kvjax.config import positive_int, sized
from kvjax.scorers.base import (
    AbstractScorer,
    last_queries,
    mass_received,
    ordered,
    position_order,
    protect_last,
    unsorted,
)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Lava(AbstractScorer):
    """A bound of what a token's loss does to the output of its layer.

    Mean attention of the window's queries, max-pooled along the sequence among the
    tokens before the window, times the largest L1 norm of a value among those; the
    largest over the group. Scores of different heads and layers can be compared.

    Attributes:
        window: queries at the end of the prompt that vote; their own tokens are kept.
        kernel: width of the max pooling.

    Source: LAVa (Findings of EMNLP 2025); the authors' `snapkv_utils.py`
    (window 32, max pooling of 7).
    Deviations: the norm is the largest before the window, as in their code; that of the
    paper is the largest of all. The window is protected by `+inf`.
    """

    window: int = sized(32, short=8, recent=True)
    kernel: int = 7

    def __post_init__(self):
        positive_int("window", self.window)
        positive_int("kernel", self.kernel)

    @property
    def protected(self):
        return self.window

    def row(self, asked, before):
        return last_queries(asked, self.window, before)

    def score(self, memory, held, counts):
        del counts
        mean = mass_received(memory.row, held) / self.window
        b, kv_heads, tokens = held.positions.shape
        # Of the group at once: the largest of the largest is that of all.
        mean = jnp.max(mean.reshape(b, kv_heads, -1, tokens), axis=2)
        before = held.positions < (held.seen - self.window)[:, None, None]
        before = held.live & before
        order = None if self.kernel == 1 else position_order(held)
        mean = ordered(jnp.where(before, mean, 0.0), order)
        pooled = unsorted(_max_pool(mean, self.kernel), order)
        norms = jnp.sum(jnp.abs(held.v.astype(jnp.float32)), axis=-1)
        largest = jnp.max(jnp.where(before, norms, 0.0), axis=-1, keepdims=True)
        return protect_last(pooled * largest, held, self.window)


def _max_pool(x: Array, kernel: int) -> Array:
    """Centred moving maximum over the last axis of what is not negative."""
    left, width = (kernel - 1) // 2, x.shape[-1]
    pad = [(0, 0)] * (x.ndim - 1) + [(left, kernel - 1 - left)]
    padded = jnp.pad(x, pad)
    shifted = [padded[..., i : i + width] for i in range(kernel)]
    return jnp.max(jnp.stack(shifted), axis=0)
