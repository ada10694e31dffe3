"""LAVa: layers get slots by the entropy of their scores, heads by the scores."""

import dataclasses
from typing import ClassVar, final

import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.budgets._sharing import AbstractSharing, best_of_all, by_preference


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Lava(AbstractSharing):
    """Layers share by the entropy of their scores; heads of a layer by the scores.

    Every layer has the tokens that the score protects, its window. The rest of the
    budget is divided among layers in proportion to the entropy of a layer's scores, all
    heads being one distribution, over the logarithm of their number (`apportioned`: the
    sum is exactly that of the uniform budget). In a layer, slots go to the best tokens
    of all heads together. There is nothing to tune.

    Scores must not be negative; those that are count as 0 in the entropy.

    Cost: a sort of the scores of each layer. The prompt's keys and values of all layers
    are held until the last one has been seen; the authors evict layer by layer, with
    the same result.

    Source: LAVa (Findings of EMNLP 2025); the authors' `snapkv_utils.py` and
    `adaptive_mistral_hijack_lava.py`.
    Deviations: a head and a layer have at most `most` times the mean, and what they
    cannot take goes to others. Highest averages in place of rounding down. Only layers
    that compute the same share, see `AbstractSharing`.
    """

    weighs: ClassVar[bool] = True

    def allot(self, scores, looks, slots, lengths, specs):
        del looks, lengths, specs
        heads = scores.shape[2]
        found = by_preference(self, _log_entropy(scores), scores, slots)
        most = jnp.broadcast_to(self.limits(scores, slots)[..., None], scores.shape[:3])
        return best_of_all(scores, total=heads * found, most=most)


def _log_entropy(scores: Float[Array, "L B K S"]) -> Float[Array, "L B"]:
    """Logarithm of the normalised entropy of the scores that are finite."""
    finite = jnp.isfinite(scores)
    x = jnp.where(finite, jnp.maximum(scores, 0.0), 0.0)
    total = jnp.sum(x, axis=(2, 3), keepdims=True)
    p = x / jnp.where(total > 0, total, 1.0)
    logs = jnp.log(jnp.where(p > 0, p, 1.0))
    entropy = jnp.sum(-p * logs, axis=(2, 3))
    number = jnp.sum(finite, axis=(2, 3)).astype(jnp.float32)
    return jnp.log(entropy / jnp.log(jnp.maximum(number, 2.0)))
