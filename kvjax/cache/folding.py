"""A full tail goes into a bounded body, slot by slot: the lowest scores leave."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.merging import present
from kvjax.cache.parts import Slots
from kvjax.cache.ranking import Memory, nearly
from kvjax.cache.tail import Tail
from kvjax.cache.tracking import Folding, Tracking
from kvjax.codecs import PlainArray
from kvjax.turns import Turn, each, put, take
from kvjax.types import EMPTY, Held, LayerSpec


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
    folding: Folding,
    tracking: Tracking,
    body: Slots,
    tail: Tail,
    spec: LayerSpec,
    rows: Bool[Array, "B"],
    layer: Any,
    turn: Turn = None,
) -> tuple[Slots, Tail, Tracking]:
    """Move the tails of `rows` into the body, evicting the lowest scores of both.

    Tokens go oldest first into free slots, then over the lowest-scored slot if they
    beat it: the body ends with the best of the union, and no slot is copied. Where
    tokens are merged, only their places move so; then the body is written anew.
    """
    keys, values = body.keys, body.values
    assert isinstance(keys, PlainArray) and isinstance(values, PlainArray)
    own, given = take(tail, turn), take(tracking, turn)
    both = _Both(take(body.positions, turn), own, given, spec, layer)
    stored = take((keys.data, values.data), turn)
    scores = _ranked(folding, both, stored, rows)
    near = (lambda _: 0.0) if folding.score.exact else nearly
    if folding.merge is None:
        moving = (keys.data, values.data, body.positions, tracking.body)
        fresh = (own.keys, own.values, own.positions, given.tail)
        moved = _moved(moving, fresh, both, scores, rows, near, turn, turn)
    else:
        *small, origin = _moved(*both.places(), both, scores, rows, near, None, turn)

        def rewrite(_: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            new = _merged(folding, both, take(carry, turn), origin, rows)
            new, carry = jax.lax.optimization_barrier((new, carry))
            return put(carry, new, turn)

        pair = (keys.data, values.data)
        pair = _often(1, own.capacity == 1, jnp.any(rows), rewrite, pair, turn)
        moved = (*pair, *put((body.positions, tracking.body), tuple(small), turn))
    new_keys, new_values, positions, slots = moved
    body = dataclasses.replace(
        body,
        keys=PlainArray(data=new_keys),
        values=PlainArray(data=new_values),
        positions=positions,
    )
    late = jax.tree.map(
        lambda old, x: put(old, _blank(x, rows), turn), tracking.tail, given.tail
    )
    tracking = dataclasses.replace(tracking, body=slots, tail=late)
    return body, tail.emptied(rows, turn), tracking


def _ranked(
    folding: Folding,
    both: "_Both",
    body: tuple[Array, Array],
    rows: Bool[Array, "B"],
) -> Float[Array, "B K X"]:
    """Scores of body and tail slots; anything where no row is folded."""

    def run() -> Array:
        return both.useful(folding.score.ranked, both.held(*body))

    if both.tail.capacity == 1:
        return run()
    # Scores are computed on condition, and nothing else: a body that went through the
    # branches would be copied at every step.
    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run))
    return jax.lax.cond(jnp.any(rows), run, lambda: blank)


def _moved(
    moving: Any,
    fresh: Any,
    both: "_Both",
    every: Float[Array, "B K X"],
    rows: Bool[Array, "B"],
    near: Callable[[Array], Array | float],
    where: Turn,
    turn: Turn,
) -> Any:
    """`moving`, of the body's slots, with what is of the tail's in their best slots.

    Args:
        moving: arrays of the body, those of several layers if `where` says which.
        fresh: the same of the tail of one layer.
        both: body and tail.
        every: their scores.
        rows: whose tails move.
        near: how far from a score its equals are: of these the oldest stay.
        where: place of the layer in `moving`.
        turn: place of the layer in the cache.
    """
    slots, capacity = both.at.shape[-1], both.tail.capacity
    scores, late = every[..., :slots], every[..., slots:]
    scores = jnp.where(both.at == EMPTY, -jnp.inf, scores)
    usable = jnp.arange(slots) < both.tracking.limit[:, None, None]
    scores = jnp.where(usable, scores, jnp.inf)
    live = (both.tail.positions >= 0) & rows[:, None, None]

    def step(j, carry):
        held, scores, at = carry
        low = jnp.min(scores, axis=-1)
        low = low + near(low)
        slot = jnp.argmax(jnp.where(scores <= low[..., None], at, EMPTY - 1), axis=-1)
        score = jnp.take(late, j, axis=-1)
        on = jnp.take(live, j, axis=-1) & (score > low)
        token = jax.tree.map(lambda x: jnp.take(x, j, axis=2), fresh)
        held = jax.tree.map(lambda x, y: put_slot(x, y, slot, on, where), held, token)
        place = jnp.take(both.tail.positions, j, axis=-1)
        at = put_slot(at, place, slot, on)
        return held, put_slot(scores, score, slot, on), at

    carry = (moving, scores, both.at)
    # What is read above is written below, which nothing but data puts in order.
    carry, fresh = jax.lax.optimization_barrier((carry, fresh))
    return _often(capacity, capacity == 1, jnp.any(rows), step, carry, turn)[0]


@dataclasses.dataclass(frozen=True)
class _Both:
    """Body and tail of one layer as one, the body first."""

    at: Int[Array, "B K S"]
    tail: Tail
    tracking: Tracking
    spec: LayerSpec
    layer: Any

    def held(self, k: Array, v: Array) -> Held:
        """What they hold; keys and values of the body are given."""
        positions = _joined(self.at, self.tail.positions)
        return Held(
            k=_joined(k, self.tail.keys),
            v=_joined(v, self.tail.values),
            positions=positions,
            seen=jnp.max(positions, axis=(1, 2)) + 1,
            layer=self.layer,
            spec=self.spec,
        )

    def memory(self) -> Memory:
        """What is remembered of it."""
        slots = jax.tree.map(_joined, self.tracking.body, self.tracking.tail)
        return Memory(slots=slots, row=self.tracking.row)

    def useful(self, of: Callable[..., Array], held: Held) -> Array:
        """Scores, as after the prompt: what no later query sees takes no slot."""
        scores = of(self.memory(), held, self.tracking.limit).astype(jnp.float32)
        if self.spec.window is None:
            return scores
        edge = held.seen[:, None, None] - 1 - self.spec.window
        return jnp.where(held.positions > edge, scores, -jnp.inf)

    def places(self) -> tuple[Any, Any]:
        """Of body and of tail all but keys and values, and the places of these."""
        b, heads, slots = self.at.shape
        count = slots + self.tail.capacity
        origin = jnp.broadcast_to(jnp.arange(count), (b, heads, count))
        return (
            (self.at, self.tracking.body, origin[..., :slots]),
            (self.tail.positions, self.tracking.tail, origin[..., slots:]),
        )


def _merged(
    folding: Folding,
    both: _Both,
    body: tuple[Array, Array],
    origin: Int[Array, "B K S"],
    rows: Bool[Array, "B"],
) -> tuple[Array, Array]:
    """Keys and values of the body, with what was dropped of `rows` in them.

    Args:
        folding: how.
        both: body and tail before.
        body: keys and values, before.
        origin: for each slot of the body, which of those of both it holds now.
        rows: whose tails went into the body.
    """
    assert folding.merge is not None
    held = both.held(*body)
    scores = both.useful(folding.score.score, held)
    scores = folding.score.unprotected(both.memory(), held, scores)
    held, rows = present(held), rows[:, None, None]
    b, heads, count = held.positions.shape
    at = (jnp.arange(b)[:, None, None], jnp.arange(heads)[:, None], origin)
    kept = jnp.zeros((b, heads, count), bool).at[at].set(True)
    new = folding.merge.merged(held, kept & held.live, scores.astype(jnp.float32))

    def placed(x: Array, old: Array) -> Array:
        moved = jnp.take_along_axis(x, origin[..., None], axis=2)
        return jnp.where(rows[..., None], moved, old)

    k, v = map(placed, new, body)
    return k, v


def _joined(body: Array, tail: Array) -> Array:
    return jnp.concatenate([body, tail], axis=2)


def _blank(x: Array, rows: Array) -> Array:
    """Zeros in the given rows."""
    return jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), jnp.zeros((), x.dtype), x)


def _often(
    count: int, always: bool, wanted: Array, step: Any, carry: Any, turn: Turn
) -> Any:
    """`step` `count` times if `wanted`, or once, `always`; what is stacked stays put.

    The parallel form, where layers are not stacked, needs a loop that has a gradient.
    """
    if always:
        return step(0, carry)
    if turn is not None:
        return jax.lax.fori_loop(0, jnp.where(wanted, count, 0), step, carry)
    return jax.lax.cond(
        wanted, lambda c: jax.lax.fori_loop(0, count, step, c), lambda c: c, carry
    )
