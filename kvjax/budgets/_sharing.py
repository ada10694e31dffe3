"""What budgets have in common for which all layers share by what is found in them."""

import dataclasses
import math
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax import exact
from kvjax.budgets.base import AbstractBudget, same_in_all
from kvjax.fields import Range


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractSharing(AbstractBudget):
    """All layers together have what they would have if all had the same.

    Layers share with those whose buffer is theirs: with all that compute the same and
    are one loop (`kvjax.depth`), windows of another size for instance aside. Slots of
    all heads of these must fit in 31 bits, as their buffer's do.

    Attributes:
        most: a head gets at most `most` times the mean, rounded down, and no more than
            there is to hold; what it cannot take goes to others. The shortest decimal
            it prints as.
    """

    most: Annotated[float, Range(1)] = 4.0
    per_head: ClassVar[bool] = True
    surveys: ClassVar[bool] = True

    def by_layer(self, mean, lengths, specs):
        del lengths
        return same_in_all(mean, specs)

    def most_of(self, slots, tokens):
        return min(math.floor(slots * exact.decimal(self.most)), tokens)

    def limits(
        self, scores: Float[Array, "L B K S"], slots: Int[Array, "L B"]
    ) -> Int[Array, "L B"]:
        """The most slots of a head of each layer.

        Args:
            scores: priorities of the tokens; `-inf` cannot be kept.
            slots: slots per head of each layer, on average.
        """
        tokens = scores.shape[-1]
        rest = exact.decimal(self.most) - math.floor(self.most)
        whole = min(math.floor(self.most), tokens)
        some = jnp.minimum(slots, tokens // whole)  # its product fits in 32 bits
        some = some * whole + exact.floor_share(slots, rest)
        some = jnp.where(slots > tokens // whole, tokens, some)
        usable = jnp.sum(scores > -jnp.inf, axis=-1, dtype=jnp.int32)
        return jnp.minimum(some, jnp.max(usable, axis=-1))


def by_preference(
    budget: AbstractSharing,
    preference: Float[Array, "L B"],
    scores: Float[Array, "L B K S"],
    slots: Int[Array, "L B"],
) -> Int[Array, "L B"]:
    """Slots per head of each layer: what scores protect, the rest by preference.

    Args:
        budget: of these layers.
        preference: logarithms.
        scores: priorities of the tokens, `+inf` where they are protected.
        slots: slots per head of each layer, on average.
    """
    protected = jnp.sum(jnp.isposinf(scores), axis=-1, dtype=jnp.int32)
    most = budget.limits(scores, slots)
    sure = jnp.minimum(jnp.max(protected, axis=-1), jnp.minimum(slots, most))
    left = jnp.sum(slots, axis=0) - jnp.sum(sure, axis=0)
    return sure + apportioned(weights_of(preference), left, most - sure)


def weights_of(preference: Float[Array, "L B"]) -> Float[Array, "L B"]:
    """Weights `1e-9 .. 1` in proportion, of logarithms; all 1 where all weigh 0."""
    top = jnp.max(preference, axis=0)
    weights = jnp.exp(preference - jnp.where(jnp.isneginf(top), 0.0, top))
    return jnp.where(jnp.isneginf(top), 1.0, jnp.maximum(weights, 1e-9))


def apportioned(
    weights: Float[Array, "L B"], total: Int[Array, "B"], most: Int[Array, "L B"]
) -> Int[Array, "L B"]:
    """Whole numbers in proportion to weights that sum to `total`: highest averages.

    As if one slot after the other went to the layer with the largest `weight / (slots +
    1/2)` among those below `most`, ties to the lower layer: a layer that is added never
    makes another grow. All but the last few slots of each are found by bisection of the
    average that they are above of; the sum is exact, and `total` or that of `most`.

    Args:
        weights: of each layer, `1e-9 .. 1`.
        total: of each row.
        most: of each layer.
    """

    def above(inverse: Array) -> Array:
        slots = jnp.floor(weights * inverse + 0.5)
        return jnp.minimum(slots, most.astype(jnp.float32)).astype(jnp.int32)

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = jnp.sqrt(low) * jnp.sqrt(high)
        fits = jnp.sum(above(middle), axis=0) <= total
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    total = jnp.minimum(total, jnp.sum(most, axis=0))
    ends = jnp.full(total.shape, 0.25), jnp.full(total.shape, 1e18)
    found = jnp.minimum(above(jax.lax.fori_loop(0, 32, halve, ends)[0]), most)
    # Rounded numbers may be a little too high; none of these is.
    found = jnp.maximum(found - 1 - (found >> 20), 0)

    def grow(found: Array) -> Array:
        average = weights / (found.astype(jnp.float32) + 0.5)
        best = jnp.argmax(jnp.where(found < most, average, -1.0), axis=0)
        mine = jnp.arange(len(weights))[:, None] == best
        return found + (mine & short(found)).astype(jnp.int32)

    def short(found: Array) -> Array:
        return jnp.sum(found, axis=0) < total

    return jax.lax.while_loop(lambda found: jnp.any(short(found)), grow, found)


def best_of_all(
    scores: Float[Array, "*lead H S"],
    total: Int[Array, "*lead"],
    most: Int[Array, "*lead H"],
    sure: Int[Array, "*lead H"] | int = 0,
) -> Int[Array, "*lead H"]:
    """Slots of each head where those of all go to the best tokens of all.

    What is behind the `most` best of a head is nobody's. Of the others, the `sure` best
    of each head are kept and then the highest scores of all: those above the score of
    the last one, and of its equals those of the lower heads.

    Args:
        scores: of all tokens; `-inf` gets no slot.
        total: slots of all heads together.
        most: the most slots of each head.
        sure: slots that each head gets in any case.
    """
    heads, tokens = scores.shape[-2:]
    sure = jnp.broadcast_to(jnp.asarray(sure, jnp.int32), most.shape)
    ranked = -jnp.sort(-jax.lax.stop_gradient(scores), axis=-1)
    rank = jnp.arange(tokens)
    inside = (rank < most[..., None]) & (ranked > -jnp.inf)
    first = inside & (rank < sure[..., None])
    first = jnp.sum(first, axis=-1, dtype=jnp.int32)
    ranked = jnp.where(inside & (rank >= sure[..., None]), ranked, -jnp.inf)
    total = jnp.maximum(total - jnp.sum(first, axis=-1), 0)
    flat = jnp.sort(ranked.reshape(*ranked.shape[:-2], -1), axis=-1)
    last = jnp.clip(heads * tokens - total, 0, heads * tokens - 1)
    last = jnp.take_along_axis(flat, last[..., None], axis=-1)[..., None]
    above = jnp.sum(ranked > last, axis=-1, dtype=jnp.int32)
    equal = (ranked == last) & (ranked > -jnp.inf)
    equal = jnp.sum(equal, axis=-1, dtype=jnp.int32)
    left = total[..., None] - jnp.sum(above, axis=-1, keepdims=True)
    equal = jnp.clip(left - (jnp.cumsum(equal, axis=-1) - equal), 0, equal)
    return first + above + equal
