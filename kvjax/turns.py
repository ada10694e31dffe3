"""Arrays of several layers, stacked along a first axis, and one layer of them.

The caches of layers that compute the same are one pytree whose leaves have a first axis
for the layers (`kvjax.depth`). A layer is read and written where it lies: `turn` is its
place, a traced integer. None stands for arrays of one layer, without that axis.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

Turn = Int[Array, ""] | int | None
"""Place of a layer on the first axis of its arrays; None where they have no such axis.
"""


FEW = 16
"""Writes that are spelt out; more of them become a loop."""


def take[T](tree: T, turn: Turn) -> T:
    """One layer's arrays. A copy, where nothing is fused with it: for small arrays."""
    if turn is None:
        return tree
    return jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, turn, 0, keepdims=False), tree
    )


def put[T](tree: T, new: T, turn: Turn) -> T:
    """All layers' arrays with one layer's replaced."""
    if turn is None:
        return new
    return jax.tree.map(
        lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y.astype(x.dtype), turn, 0),
        tree,
        new,
    )


def row_of(turn: Turn, rows: int) -> Int[Array, ""] | None:
    """Where a layer's `rows` begin among those of `flat`."""
    return None if turn is None else jnp.asarray(turn * rows, jnp.int32)


def cut(x: Array, start: Any, size: int, axis: int, turn: Turn) -> Array:
    """`size` entries of one layer from `start` on along `axis` (negative)."""
    if turn is None:
        return jax.lax.dynamic_slice_in_dim(x, start, size, axis % x.ndim)
    starts, sizes = [jnp.int32(0)] * x.ndim, list(x.shape)
    starts[0], sizes[0] = turn, 1
    starts[axis], sizes[axis] = jnp.asarray(start, jnp.int32), size
    return jax.lax.dynamic_slice(x, starts, sizes)[0]


def flat[T](tree: T, turn: Turn) -> T:
    """Layers and rows `[L, B, ...]` as rows `[L * B, ...]`, for ops that take a row."""
    if turn is None:
        return tree
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def each(count: int, write: Callable[[Any, Array], Array], x: Array) -> Array:
    """`x` after `write(i, x)` for every `i` below `count`, in place.

    A scatter says the same, but is itself a loop of many small steps on a CPU.
    """
    if count > FEW:
        return jax.lax.fori_loop(0, count, write, x)
    for i in range(count):
        x = write(jnp.int32(i), x)
    return x


def at_rows(x: Array, index: tuple[Any, ...], new: Array, turn: Turn) -> Array:
    """`x` with `new` at `index`, which starts with the rows; outside is dropped."""
    index = index if turn is None else (turn, *index)
    return x.at[index].set(new.astype(x.dtype), mode="drop")
