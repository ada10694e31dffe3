"""Sums along diagonals as the kernels deliver them: backwards, and only where in line.

A tile skews by one column per row. That is a sum by distance if every key lies at its
position and the queries follow one another.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

FAR = jnp.iinfo(jnp.int32).max


def in_line(q_positions: Array, k_positions: Array) -> Array:
    """Keys lie at their positions and queries one after the other: rows are skewed."""
    slot = jnp.arange(k_positions.shape[1], dtype=jnp.int32)
    keys = jnp.all((k_positions < 0) | (k_positions == slot))
    offset = q_positions - jnp.arange(q_positions.shape[1], dtype=jnp.int32)
    live = q_positions >= 0
    same = (offset == start(q_positions)[:, None]) | ~live
    return keys & jnp.all(same)


def start(q_positions: Array) -> Array:
    """Position of the first query, counted back from those that live."""
    at = jnp.arange(q_positions.shape[1], dtype=jnp.int32)
    return jnp.max(jnp.where(q_positions >= 0, q_positions - at, -FAR), axis=1)


def by_distance(along: Array, last: Array, s: int) -> Array:
    """`out[d] = along[last - d]`, 0 outside of what there is."""
    width = along.shape[-1]
    backwards = jnp.pad(jnp.flip(along, -1), [(0, 0), (0, 0), (s, s)])
    first = jnp.clip(s + width - 1 - last, 0, s + width)
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=s, axis=-1)
    return jax.vmap(cut)(backwards, first)
