"""How far what a pass computes on its way is from a teacher's."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kvjax.train.objectives.passes import Watched
from kvjax.types import Lengths

Places = Callable[[Array, Array, Lengths], Bool[Array, "B T-1"]]


def answers(flags: Array, weights: Array, points: Lengths) -> Array:
    """Where an answer token is predicted, as the KL divergence has it."""
    del weights, points
    return flags[:, 1:]


def behind(flags: Array, weights: Array, points: Lengths) -> Array:
    """Where any token behind the compression point is predicted.

    Up to the last one that is an answer or has a weight: padding has neither.
    """
    target = (flags | (weights > 0)).astype(jnp.int32)
    live = jax.lax.cummax(target, axis=1, reverse=True) > 0
    index = jnp.arange(flags.shape[1])
    return (live & (index >= points[:, None]))[:, 1:]


EVERY = 4
"""Of how many tokens of a context one is compared."""


def in_context(points: Lengths, width: int, step: Array) -> Bool[Array, "B T-1"]:
    """Where one of `EVERY` tokens in front of the compression points is predicted.

    Other ones in every step, so that all are compared in time.
    """
    index = jnp.arange(1, width)
    return (index < points[:, None]) & ((index + step) % EVERY == 0)


PLACES: Mapping[str, Places] = MappingProxyType({"answers": answers, "behind": behind})
"""By name: `(answers [B T], weights [B T], compression points [B])` to a mask."""


def distances(
    ours: Watched, wanted: Watched, places: Bool[Array, "B T-1"]
) -> dict[str, Float[Array, ""]]:
    """Mean `relative_error` over the layers, by the name of the term."""
    pairs = {
        "hidden": (ours.hidden, wanted.hidden),
        "attention": (ours.attention, wanted.attention),
    }
    each = jax.vmap(lambda x, y: relative_error(x[:, :-1], y[:, :-1], places))
    return {
        name: jnp.mean(each(one, other))
        for name, (one, other) in pairs.items()
        if one is not None
    }


def relative_error(
    ours: Float[Array, "B T C"],
    wanted: Float[Array, "B T C"],
    places: Bool[Array, "B T"],
) -> Float[Array, ""]:
    """Mean squared error over `places`, as a share of `wanted`'s mean square there.

    0 where `places` is empty; no gradient reaches `wanted`.
    """
    wanted = jax.lax.stop_gradient(wanted).astype(jnp.float32)
    miss = jnp.square(ours.astype(jnp.float32) - wanted)
    counted = places[..., None]
    total = jnp.sum(jnp.where(counted, jnp.square(wanted), 0.0))
    return jnp.sum(jnp.where(counted, miss, 0.0)) / jnp.maximum(total, 1e-30)
