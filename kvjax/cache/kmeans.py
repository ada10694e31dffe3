"""Clusters of keys: spherical k-means inside of segments; arrays in, arrays out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.types import EMPTY, NEG_INF, NEVER


class Clusters(NamedTuple):
    """Tokens of `X` segments, `N` slots each, in `C` clusters each; some may be empty.

    Attributes:
        key, value: means of the members; 0 of none.
        size: how many there are.
        span: oldest and newest position of the members.
        order: the slots of the segment, those of the first cluster in front, then those
            of the second, and last those in no cluster.
    """

    key: Float[Array, "X C D"]
    value: Float[Array, "X C D"]
    size: Int[Array, "X C"]
    span: Int[Array, "X C 2"]
    order: Int[Array, "X N"]


def assigned(
    keys: Float[Array, "X N D"], live: Bool[Array, "X N"], count: int, iterations: int
) -> Int[Array, "X N"]:
    """The cluster of each key, by the cosine to its centre; of dead slots anything.

    Centres begin as keys at equal distances. In each iteration keys go to the centre
    whose direction is nearest, and centres to the sum of their keys; one without keys
    stays where it is.
    """
    x = jax.lax.stop_gradient(keys).astype(jnp.float32)
    x = jnp.where(live[..., None], x, 0)

    def nearest(centres: Array) -> Array:
        norm = jnp.linalg.norm(centres, axis=-1, keepdims=True)
        unit = centres / jnp.where(norm > 0, norm, 1.0)
        # A centre of no direction would draw keys that are far from all others.
        cosine = jnp.einsum("XND,XCD->XNC", x, unit)
        cosine = jnp.where((norm > 0).mT, cosine, NEG_INF)
        return jnp.argmax(cosine, axis=-1).astype(jnp.int32)

    def step(_, centres: Array) -> Array:
        member = members(nearest(centres), live, count)
        total = jnp.einsum("XNC,XND->XCD", member.astype(jnp.float32), x)
        return jnp.where(jnp.any(member, axis=1)[..., None], total, centres)

    # Those in the middle of as many pieces of the live ones.
    there = jnp.sum(live, axis=1, dtype=jnp.int32)[:, None]
    place = (2 * jnp.arange(count) + 1) * there // (2 * count)
    slot = jnp.take_along_axis(jnp.argsort(~live, axis=1), place, axis=1)
    start = jnp.take_along_axis(x, slot[..., None], axis=1)
    return nearest(jax.lax.fori_loop(0, iterations - 1, step, start))


def members(
    cluster: Int[Array, "X N"], live: Bool[Array, "X N"], count: int
) -> Bool[Array, "X N C"]:
    """Which keys are in which cluster."""
    return jax.nn.one_hot(cluster, count, dtype=jnp.bool_) & live[..., None]


def clustered(
    keys: Float[Array, "X N D"],
    values: Float[Array, "X N D"],
    positions: Int[Array, "X N"],
    live: Bool[Array, "X N"],
    *,
    count: int,
    iterations: int,
) -> Clusters:
    """`count` clusters of the live keys of each segment.

    Differentiable in keys and values, given which cluster each is in.
    """
    cluster = assigned(keys, live, count, iterations)
    member = members(cluster, live, count)
    size = jnp.sum(member, axis=1, dtype=jnp.int32)

    def mean(x: Array) -> Array:
        x = jnp.where(live[..., None], x, 0).astype(jnp.float32)
        total = jnp.einsum("XNC,XND->XCD", member.astype(jnp.float32), x)
        return total / jnp.maximum(size, 1)[..., None].astype(jnp.float32)

    at = positions[..., None]
    span = (
        jnp.min(jnp.where(member, at, NEVER), axis=1),
        jnp.max(jnp.where(member, at, EMPTY), axis=1),
    )
    return Clusters(
        key=mean(keys).astype(keys.dtype),
        value=mean(values).astype(values.dtype),
        size=size,
        span=jnp.stack(span, axis=-1),
        order=jnp.argsort(jnp.where(live, cluster, count), axis=-1).astype(jnp.int32),
    )
