"""AdaKV over a model: the heads of all layers share all slots by their scores."""

import dataclasses
from typing import final

import jax.numpy as jnp

from kvjax import exact
from kvjax.budgets._sharing import AbstractSharing, best_of_all
from kvjax.fields import Share


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaKVGlobal(AbstractSharing):
    """Every head keeps its own best tokens; the rest goes to the best of all layers.

    Each head surely gets `safeguard` of the mean budget, rounded down but at least 1;
    the other slots go to the highest scores of all heads of all layers together,
    whatever their scale.

    A head takes its best tokens up to its limit (`most`) and the rest of it are out of
    the running; then the tokens of all heads are one list in order of their scores,
    the safe ones in front, which is cut at the number of slots. What a head cannot take
    so goes to the next best scores of others, and no more than one pass is needed.

    Attributes:
        safeguard: fraction of the mean budget that each head surely gets. It is the
            shortest decimal it prints as.

    Cost: a sort of the scores of all heads and tokens of a row. The prompt's keys and
    values of all layers are held until the last one has been seen.

    Source: Ada-KV (2407.11550) algorithm 1, over the heads of a model instead of those
    of a layer.
    Deviations: a head has at most `most` times the mean. Only layers that compute the
    same share, see `AbstractSharing`.
    """

    safeguard: Share = 0.2

    def allot(self, scores, looks, slots, lengths, specs):
        del looks, lengths, specs
        layers, rows, heads, tokens = scores.shape

        def line_up(x):  # [L, B] as [B, L * K], all heads in order of the layers
            return jnp.repeat(x.T, heads, axis=-1)

        safe = exact.floor_share(slots, exact.decimal(self.safeguard))
        counts = best_of_all(
            jnp.moveaxis(scores, 1, 0).reshape(rows, layers * heads, tokens),
            total=heads * jnp.sum(slots, axis=0),
            most=line_up(self.limits(scores, slots)),
            sure=line_up(jnp.maximum(safe, 1)),
        )
        return jnp.moveaxis(counts.reshape(rows, layers, heads), 0, 1)
