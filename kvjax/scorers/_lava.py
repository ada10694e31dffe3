"""LAVa: attention that the last queries pay, times the largest value of the head."""

import dataclasses
from typing import final

import jax.numpy as jnp

from kvjax.config import sized
from kvjax.fields import Kernel, Size
from kvjax.pallas_kernels.partial import feature_sum
from kvjax.scorers._window import AbstractWindow
from kvjax.scorers.base import mass_received, max_pool, protect_last


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Lava(AbstractWindow):
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

    window: Size = sized(32, short=8, recent=True)
    kernel: Kernel = 7

    def score(self, memory, held, counts):
        del counts
        mean = mass_received(memory.row, held) / self.window
        b, kv_heads, tokens = held.positions.shape
        # Of the group at once: the largest of the largest is that of all.
        mean = jnp.max(mean.reshape(b, kv_heads, -1, tokens), axis=2)
        pooled = self.pooled(mean, held, max_pool)
        norms = feature_sum(jnp.abs(held.v.astype(jnp.float32)))
        norms = jnp.where(self.before(held), norms, 0.0)
        largest = jnp.max(norms, axis=-1, keepdims=True)
        return protect_last(pooled * largest, held, self.window)
