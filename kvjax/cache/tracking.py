"""Eviction while decoding: a bounded body that takes up the tail, slot by slot."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.parts import Slots
from kvjax.cache.tail import Tail
from kvjax.codecs import PlainArray
from kvjax.types import EMPTY, LayerSpec, pytree


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractTracker(abc.ABC):
    """Keeps a score of every slot up to date while tokens are decoded.

    The state's tree structure, shapes and dtypes never change.

    Attributes:
        interval: tokens between evictions, the capacity of the tail.
    """

    interval: int

    @abc.abstractmethod
    def update(
        self,
        state: Any,
        q: Float[Array, "B H 1 D"],
        q_positions: Int[Array, "B 1"],
        body: Slots,
        tail: Tail,
        spec: LayerSpec,
    ) -> Any:
        """State after one more query; rows whose position is `EMPTY` do not change."""

    @abc.abstractmethod
    def scores(
        self, state: Any, body: Slots, tail: Tail, spec: LayerSpec
    ) -> tuple[Float[Array, "B K S"], Float[Array, "B K R"]]:
        """Scores of body and tail slots; those of free slots are ignored."""

    def moved(self, state: Any, slot: Int[Array, "B K"], j: Any, on: Any) -> Any:
        """State after tail token `j` went into body slot `slot` where `on`."""
        del slot, j, on
        return state

    def cleared(self, state: Any, rows: Bool[Array, "B"]) -> Any:
        """State after the tail of `rows` was emptied."""
        del rows
        return state


@pytree
class Tracking:
    """A tracker's state, and how many body slots a row may use."""

    state: Any
    limit: Int[Array, "B"]


def put_slot(x: Array, new: Array, slot: Array, on: Array) -> Array:
    """`x[b, k, slot[b, k]] = new[b, k]` where `on[b, k]`."""

    def one(row, value, at, write):
        old = jax.lax.dynamic_index_in_dim(row, at, 0, keepdims=False)
        value = jnp.where(write, value.astype(row.dtype), old)
        return jax.lax.dynamic_update_index_in_dim(row, value, at, 0)

    return jax.vmap(jax.vmap(one))(x, new, slot, on)


def fold(
    tracker: AbstractTracker,
    tracking: Tracking,
    body: Slots,
    tail: Tail,
    spec: LayerSpec,
    rows: Bool[Array, "B"],
) -> tuple[Slots, Tail, Tracking]:
    """Move the tails of `rows` into the body, evicting the lowest scores of both.

    Tokens go oldest first into free slots, then over the lowest-scored slot if they
    beat it: the body ends with the best of the union, and no slot is copied.
    """
    keys, values = body.keys, body.values
    assert isinstance(keys, PlainArray) and isinstance(values, PlainArray)
    scores, tail_scores = tracker.scores(tracking.state, body, tail, spec)
    index = jnp.arange(body.positions.shape[-1])
    usable = index < tracking.limit[:, None, None]
    scores = jnp.where(body.positions == EMPTY, -jnp.inf, scores)
    scores = jnp.where(usable, scores, jnp.inf)
    live = (tail.positions >= 0) & rows[:, None, None]

    def step(j, carry):
        keys, values, positions, scores, state = carry
        slot = jnp.argmin(scores, axis=-1)
        low = jnp.take_along_axis(scores, slot[..., None], axis=-1)[..., 0]
        score = jnp.take(tail_scores, j, axis=-1)
        on = jnp.take(live, j, axis=-1) & (score > low)
        return (
            put_slot(keys, jnp.take(tail.keys, j, axis=2), slot, on),
            put_slot(values, jnp.take(tail.values, j, axis=2), slot, on),
            put_slot(positions, jnp.take(tail.positions, j, axis=2), slot, on),
            put_slot(scores, score, slot, on),
            tracker.moved(state, slot, j, on),
        )

    carry = (keys.data, values.data, body.positions, scores, tracking.state)
    new_keys, new_values, positions, _, state = jax.lax.fori_loop(
        0, tail.capacity, step, carry
    )
    body = dataclasses.replace(
        body,
        keys=PlainArray(data=new_keys),
        values=PlainArray(data=new_values),
        positions=positions,
    )
    tail = dataclasses.replace(
        tail,
        positions=jnp.where(rows[:, None, None], EMPTY, tail.positions),
        used=jnp.where(rows, 0, tail.used),
    )
    state = tracker.cleared(state, rows)
    return body, tail, Tracking(state=state, limit=tracking.limit)
