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
from kvjax.turns import Turn, each, put, take
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
        q: Float[Array, "B H T D"],
        q_positions: Int[Array, "B T"],
        lse: Float[Array, "B H T"],
        body: Slots,
        tail: Tail,
        spec: LayerSpec,
    ) -> Any:
        """State after more queries, at most as many as the tail holds.

        Args:
            state: before them.
            q: queries after RoPE, in order; their tokens are in the tail.
            q_positions: `EMPTY` behind those that a row has, which change nothing.
            lse: of their attention over body and tail.
            body: of the layer.
            tail: likewise.
            spec: the layer.
        """

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
    limit: Int[Array, "*layers B"]


def put_slot(x: Array, new: Array, slot: Array, on: Array, turn: Turn = None) -> Array:
    """`x[b, k, slot[b, k]] = new[b, k]` where `on[b, k]`."""
    rows, heads = slot.shape
    lead, rest = () if turn is None else (turn,), x.shape[3 + (turn is not None) :]
    here = x[(*lead, jnp.arange(rows)[:, None], jnp.arange(heads)[None], slot)]
    mask = on.reshape(*on.shape, *(1 for _ in rest))
    # All is read before anything is written, or every write would copy the whole.
    new, x = jax.lax.optimization_barrier((jnp.where(mask, new, here), x))

    def one(i: Array, held: Array) -> Array:
        b, k = i // heads, i % heads
        at = (*lead, b, k, slot[b, k], *(jnp.int32(0) for _ in rest))
        token = new[b, k].astype(held.dtype)
        token = token.reshape((1,) * (len(lead) + 3) + rest)
        return jax.lax.dynamic_update_slice(held, token, at)

    return each(rows * heads, one, x)


def fold(
    tracker: AbstractTracker,
    tracking: Tracking,
    body: Slots,
    tail: Tail,
    spec: LayerSpec,
    rows: Bool[Array, "B"],
    turn: Turn = None,
) -> tuple[Slots, Tail, Tracking]:
    """Move the tails of `rows` into the body, evicting the lowest scores of both.

    Tokens go oldest first into free slots, then over the lowest-scored slot if they
    beat it: the body ends with the best of the union, and no slot is copied.
    """
    keys, values = body.keys, body.values
    assert isinstance(keys, PlainArray) and isinstance(values, PlainArray)
    held, own, given = (
        take(body.positions, turn),
        take(tail, turn),
        take(tracking, turn),
    )

    def ranked() -> tuple[Array, Array]:
        scores, late = tracker.scores(given.state, take(body, turn), own, spec)
        return scores.astype(jnp.float32), late.astype(jnp.float32)

    # Scores are computed on condition, and nothing else: a body that went through the
    # branches would be copied at every step.
    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(ranked))
    always = own.capacity == 1
    scores, late = (
        ranked() if always else jax.lax.cond(jnp.any(rows), ranked, lambda: blank)
    )
    index = jnp.arange(held.shape[-1])
    scores = jnp.where(held == EMPTY, -jnp.inf, scores)
    scores = jnp.where(index < given.limit[:, None, None], scores, jnp.inf)
    live = (own.positions >= 0) & rows[:, None, None]

    def step(j, carry):
        keys, values, positions, scores, state = carry
        slot = jnp.argmin(scores, axis=-1)
        low = jnp.take_along_axis(scores, slot[..., None], axis=-1)[..., 0]
        score = jnp.take(late, j, axis=-1)
        on = jnp.take(live, j, axis=-1) & (score > low)
        token = (jnp.take(x, j, axis=2) for x in (own.keys, own.values, own.positions))
        moved = zip((keys, values, positions), token, strict=True)
        return (
            *(put_slot(old, new, slot, on, turn) for old, new in moved),
            put_slot(scores, score, slot, on),
            tracker.moved(state, slot, j, on),
        )

    carry = (keys.data, values.data, body.positions, scores, given.state)
    # What is read above is written below, which nothing but data puts in order.
    carry, own = jax.lax.optimization_barrier((carry, own))
    if always:
        carry = step(0, carry)
    else:
        carry = _often(own.capacity, jnp.any(rows), step, carry, turn)
    new_keys, new_values, positions, _, state = carry
    body = dataclasses.replace(
        body,
        keys=PlainArray(data=new_keys),
        values=PlainArray(data=new_values),
        positions=positions,
    )
    state = put(tracking.state, tracker.cleared(state, rows), turn)
    tracking = dataclasses.replace(tracking, state=state)
    return body, tail.emptied(rows, turn), tracking


def _often(count: int, wanted: Array, step: Any, carry: Any, turn: Turn) -> Any:
    """`step` `count` times if `wanted`, without a copy of what is stacked.

    The parallel form, where layers are not, needs a loop that has a gradient.
    """
    if turn is not None:
        return jax.lax.fori_loop(0, jnp.where(wanted, count, 0), step, carry)
    return jax.lax.cond(
        wanted, lambda c: jax.lax.fori_loop(0, count, step, c), lambda c: c, carry
    )
