"""CAKE: attention that the last queries pay, and how it varies among them."""

import dataclasses
from typing import Annotated, final

import jax.numpy as jnp

from kvjax.config import sized
from kvjax.fields import Amount, Kernel, Range
from kvjax.scorers._window import AbstractWindow
from kvjax.scorers.base import (
    average_pool,
    group_mean,
    mass_received,
    protect_last,
    received,
)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cake(AbstractWindow):
    """Mean attention of the last queries plus `gamma` times its variance, smoothed.

    Per query head, over the window's queries (the variance is the unbiased one); then
    pooled among the tokens before the window, and averaged over the group.

    Attributes:
        window: queries at the end of the prompt that vote; their own tokens are kept.
        gamma: weight of the variance.
        kernel: width of the average pooling; zeros at the border count.

    Source: CAKE (2503.12491); the authors' `cake_cache.py` (window 32,
    gamma 200, average pooling of 5).
    Deviations: the window is protected by `+inf`; the variance is a second pass around
    the mean.
    """

    window: Annotated[int, Range(2, 2**16)] = sized(32, short=8, recent=True)
    gamma: Amount = 200.0
    kernel: Kernel = 5

    def score(self, memory, held, counts):
        del counts
        mean = mass_received(memory.row, held) / self.window

        def squares(weights, asked):
            far = jnp.where(asked, weights - mean[:, :, None], 0.0)
            return jnp.sum(far * far, axis=2)

        variance = received(memory.row, held, squares) / (self.window - 1)
        raw = group_mean(mean + self.gamma * variance, held.k.shape[1])
        # Pooling is linear: after the mean over the group as well as before it.
        return protect_last(self.pooled(raw, held, average_pool), held, self.window)
