"""Eviction while decoding: a bounded body that takes up the tail, slot by slot."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.merging import AbstractMerge
from kvjax.cache.parts import Slots
from kvjax.cache.ranking import AbstractRanking, Memory
from kvjax.cache.tail import Tail
from kvjax.codecs import PlainArray
from kvjax.pallas_kernels.slots import slot_mask, slot_mass
from kvjax.turns import Turn, each, put, take
from kvjax.types import EMPTY, Held, LayerInputs, LayerSpec, pytree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folding:
    """How full tails go into a body of bounded size.

    Attributes:
        score: ranks the tokens of both; the best stay.
        merge: puts the others into them, or None.
    """

    score: AbstractRanking
    merge: AbstractMerge | None = None


@pytree
class Tracking:
    """What decode-time eviction remembers.

    Attributes:
        body, tail: `Memory.slots` of their tokens.
        row: `Memory.row`.
        limit: body slots that a row may use.
    """

    body: Any
    tail: Any
    row: Any
    limit: Int[Array, "*layers B"]


def track(
    score: AbstractRanking,
    tracking: Tracking,
    asked: LayerInputs,
    used: Int[Array, "B"],
    lse: Float[Array, "B H T"],
    body: Slots,
    tail: Tail,
    turn: Turn = None,
) -> Tracking:
    """What is remembered after more queries.

    Args:
        score: what ranks.
        tracking: before them.
        asked: the new tokens, at most as many as the tail holds.
        used: tail slots that were taken before them.
        lse: of their attention over all parts.
        body: of the layer.
        tail: with the new tokens.
        turn: which layer's, where arrays are those of several.
    """
    late = jax.tree.map(
        lambda x, new: tail.put(x, new, asked.positions, used, turn),
        tracking.tail,
        score.tokens(asked),
    )
    row = put(tracking.row, score.row(asked, take(tracking.row, turn)), turn)
    tracking = dataclasses.replace(tracking, tail=late, row=row)
    if not score.needs_mass:
        return tracking
    assert isinstance(body.keys, PlainArray)
    spec = asked.spec

    def mass(keys: Array, positions: Array) -> Array:
        mask = slot_mask(asked.positions, positions, spec.window)
        how = {"scale": spec.scale, "softcap": spec.softcap}
        return jnp.sum(slot_mass(asked.q, lse, keys, mask, **how), axis=2)

    sides = {
        "body": (body.keys.data, body.positions),
        "tail": (tail.keys, tail.positions),
    }
    for name, side in sides.items():
        old = getattr(tracking, name)
        new = score.received(take(old, turn), mass(*take(side, turn)))
        tracking = dataclasses.replace(tracking, **{name: put(old, new, turn)})
    return tracking


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
    beat it: the body ends with the best of the union, and no slot is copied.
    """
    keys, values = body.keys, body.values
    assert isinstance(keys, PlainArray) and isinstance(values, PlainArray)
    at, own, given = (
        take(body.positions, turn),
        take(tail, turn),
        take(tracking, turn),
    )

    slots = at.shape[-1]

    def ranked() -> Array:
        held = _together(take(body, turn), own, spec, layer)
        remembered = jax.tree.map(_joined, given.body, given.tail)
        memory = Memory(slots=remembered, row=given.row)
        scores = folding.score.score(memory, held, given.limit).astype(jnp.float32)
        if spec.window is None:
            return scores
        # As after the prompt: what no later query sees takes no slot from others.
        edge = held.seen[:, None, None] - 1 - spec.window
        return jnp.where(held.positions > edge, scores, -jnp.inf)

    # Scores are computed on condition, and nothing else: a body that went through the
    # branches would be copied at every step.
    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(ranked))
    always = own.capacity == 1
    every = ranked() if always else jax.lax.cond(jnp.any(rows), ranked, lambda: blank)
    scores, late = every[..., :slots], every[..., slots:]
    scores = jnp.where(at == EMPTY, -jnp.inf, scores)
    usable = jnp.arange(slots) < given.limit[:, None, None]
    scores = jnp.where(usable, scores, jnp.inf)
    live = (own.positions >= 0) & rows[:, None, None]
    # Where tokens are merged, it is the places of those that stay that move.
    moving: Any = (keys.data, values.data, body.positions, tracking.body)
    fresh: Any = (own.keys, own.values, own.positions, given.tail)
    if folding.merge is not None:
        origin = jnp.arange(slots + own.capacity, dtype=jnp.int32)
        origin = jnp.broadcast_to(origin, (*at.shape[:2], origin.shape[0]))
        moving = (take(body.positions, turn), given.body, origin[..., :slots])
        fresh = (own.positions, given.tail, origin[..., slots:])
    where = None if folding.merge is not None else turn

    def step(j, carry):
        held, scores = carry
        slot = jnp.argmin(scores, axis=-1)
        low = jnp.take_along_axis(scores, slot[..., None], axis=-1)[..., 0]
        score = jnp.take(late, j, axis=-1)
        on = jnp.take(live, j, axis=-1) & (score > low)
        token = jax.tree.map(lambda x: jnp.take(x, j, axis=2), fresh)
        held = jax.tree.map(lambda x, y: put_slot(x, y, slot, on, where), held, token)
        return held, put_slot(scores, score, slot, on)

    carry = (moving, scores)
    # What is read above is written below, which nothing but data puts in order.
    carry, fresh = jax.lax.optimization_barrier((carry, fresh))
    if always:
        carry = step(0, carry)
    else:
        carry = _often(own.capacity, jnp.any(rows), step, carry, turn)
    moved, _ = carry
    if folding.merge is not None:
        positions, remembered, origin = moved
        held = _together(take(body, turn), own, spec, layer)
        k, v = _merged(folding.merge, held, origin, every, rows)
        new = (positions, remembered, k, v)
        old = (body.positions, tracking.body, keys.data, values.data)
        positions, remembered, k, v = (
            jax.tree.map(lambda x, y: put(x, y, turn), *pair)
            for pair in zip(old, new, strict=True)
        )
        moved = (k, v, positions, remembered)
    new_keys, new_values, positions, remembered = moved
    body = dataclasses.replace(
        body,
        keys=PlainArray(data=new_keys),
        values=PlainArray(data=new_values),
        positions=positions,
    )
    late_slots = jax.tree.map(
        lambda old, x: put(old, _blank(x, rows), turn), tracking.tail, given.tail
    )
    tracking = dataclasses.replace(tracking, body=remembered, tail=late_slots)
    return body, tail.emptied(rows, turn), tracking


def _merged(
    merge: AbstractMerge,
    held: Held,
    origin: Int[Array, "B K S"],
    scores: Array,
    rows: Bool[Array, "B"],
) -> tuple[Array, Array]:
    """Keys and values of the body, with what was dropped of `rows` in them.

    Args:
        merge: how.
        held: body and tail before.
        origin: for each slot of the body, which of those it holds now.
        scores: what ranked them.
        rows: whose tails went into the body.
    """

    def run() -> tuple[Array, Array]:
        b, heads, count = held.positions.shape
        kept = jnp.zeros((b, heads, count), bool)
        at = (jnp.arange(b)[:, None, None], jnp.arange(heads)[:, None], origin)
        kept = kept.at[at].set(True) | ~rows[:, None, None]
        return merge.merged(held, kept & held.live, scores)

    k, v = jax.lax.cond(jnp.any(rows), run, lambda: (held.k, held.v))
    index = origin[..., None]
    return (
        jnp.take_along_axis(k, index, axis=2).astype(held.k.dtype),
        jnp.take_along_axis(v, index, axis=2).astype(held.v.dtype),
    )


def _together(body: Slots, tail: Tail, spec: LayerSpec, layer: Any) -> Held:
    """What body and tail hold, the body first."""
    assert isinstance(body.keys, PlainArray) and isinstance(body.values, PlainArray)
    positions = _joined(body.positions, tail.positions)
    return Held(
        k=_joined(body.keys.data, tail.keys),
        v=_joined(body.values.data, tail.values),
        positions=positions,
        seen=jnp.max(positions, axis=(1, 2)) + 1,
        layer=layer,
        spec=spec,
    )


def _joined(body: Array, tail: Array) -> Array:
    return jnp.concatenate([body, tail], axis=2)


def _blank(x: Array, rows: Array) -> Array:
    """Zeros in the given rows."""
    return jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), jnp.zeros((), x.dtype), x)


def _often(count: int, wanted: Array, step: Any, carry: Any, turn: Turn) -> Any:
    """`step` `count` times if `wanted`, without a copy of what is stacked.

    The parallel form, where layers are not, needs a loop that has a gradient.
    """
    if turn is not None:
        return jax.lax.fori_loop(0, jnp.where(wanted, count, 0), step, carry)
    return jax.lax.cond(
        wanted, lambda c: jax.lax.fori_loop(0, count, step, c), lambda c: c, carry
    )
