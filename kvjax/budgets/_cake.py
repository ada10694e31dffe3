"""CAKE: layers whose attention is spread out and shifts get more slots."""

import dataclasses
from typing import Annotated, final

import jax.numpy as jnp

from kvjax.budgets._sharing import AbstractSharing, by_preference
from kvjax.config import sized
from kvjax.fields import PositiveReal, Range
from kvjax.scorers.base import last_queries, mass_received, received


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cake(AbstractSharing):
    """Slots beyond the window go to layers in proportion to `H^(1/tau1) V^(1/tau2)`.

    `H` is the entropy of the attention that the last queries pay to tokens before the
    window, `V` the (unbiased) variance of what a token gets among those queries, summed
    over tokens; both are means over query heads. All heads of a layer get the same.
    Every layer has the tokens that the score protects, the window; the rest of the
    budget is divided (`apportioned`), so that the sum is exactly that of the uniform
    budget. A preference below a billionth of the largest counts as that.

    Attributes:
        window: queries at the end of the prompt that are looked at; the score's.
        tau1: temperature of the entropy.
        tau2: temperature of the variance.

    Cost: attention of `window` queries, again, twice. The prompt's keys and values of
    all layers are held until the last one has been seen: the paper evicts layer by
    layer and so never holds more than the budget and one layer. What is kept in the
    end is the same: rounded by highest averages, no layer gets more by one that is
    added (tests/reference/layer_budgets.py has the cascade).

    Source: CAKE (2503.12491); the authors' `modify_llama.py` and
    `cake_cache.py`. `tau1` and `tau2` are found per model (Llama-3.1: 1.6, 0.4).
    Deviations: a layer has at most `most` times the mean, and what it cannot take goes
    to others in proportion, not in equal parts. Highest averages in place of rounding
    down. Only layers that compute the same share, see `AbstractSharing`.
    """

    window: Annotated[int, Range(2, 2**16)] = sized(32, short=8, recent=True)
    tau1: PositiveReal = 1.0
    tau2: PositiveReal = 1.0

    def look(self, asked, held):
        asking = last_queries(asked, self.window, None)
        before = held.live & (held.positions < (held.seen - self.window)[:, None, None])
        before = jnp.repeat(before, held.spec.groups, axis=1)[:, :, None]
        mean = mass_received(asking, held)[:, :, None] / self.window

        def spread(weights, asked):
            logs = jnp.log(jnp.where((weights > 0) & (weights < 1), weights, 1.0))
            far = jnp.where(asked, weights - mean, 0.0)
            found = jnp.stack([-weights * logs, far * far])
            return jnp.sum(jnp.where(before, found, 0.0), axis=(2, 3, 4))

        entropy, variance = received(asking, held, spread)
        entropy, variance = entropy / self.window, variance / (self.window - 1)
        # As a logarithm, for powers of small numbers are too small; their common
        # factor, the number of query heads, is left out.
        return jnp.log(entropy) / self.tau1 + jnp.log(variance) / self.tau2

    def allot(self, scores, looks, slots, lengths, specs):
        del lengths, specs
        found = by_preference(self, looks, scores, slots)
        return jnp.broadcast_to(found[..., None], scores.shape[:3])
