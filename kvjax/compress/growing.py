"""A layer that drops nothing while rows are read in chunks: all tokens, as stored.

A chunk attends to the tokens before it as they are stored, and to itself as it is; then
it is stored too, behind them, and never again. So between chunks a layer holds codes,
and plain at most the newest tokens of each row that wait for their block.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kvjax.attention import self_attention
from kvjax.cache import (
    Growth,
    LayerCache,
    Shared,
    Slots,
    attend_earlier,
    empty_tail,
    placed,
    put_positions,
)
from kvjax.compress.rolling import Holding, Place
from kvjax.compress.stored import stored
from kvjax.compress.survey import Layout
from kvjax.reads import AbstractRead
from kvjax.turns import Turn
from kvjax.types import EMPTY, LayerInputs, LayerSpec, Lengths


def capacity(layout: Layout, columns: int, room: int) -> int:
    """Slots of a head for rows of `columns` tokens and `room` later ones."""
    block = layout.plan.block
    return max(columns, (columns + room) // block * block) if block else columns


def nothing_held(
    asked: LayerInputs, layout: Layout, slots: int, differentiable: bool = False
) -> Holding:
    """What a layer holds before the first chunk.

    Args:
        asked: any tokens of the layer; their shapes count.
        layout: without an eviction.
        slots: of a head.
        differentiable: hold what codes decode to.
    """
    b, kv_heads, _, d = asked.k.shape
    free = jnp.full((b, kv_heads, slots), EMPTY, jnp.int32)

    def made() -> list:
        blank = jnp.zeros((b, kv_heads, slots, d), asked.k.dtype)
        how = (blank, free >= 0, free, asked.spec)
        codecs = layout.plan.store.codecs
        return [stored(x, *how, differentiable=differentiable) for x in codecs]

    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(made))
    rest = None
    if block := layout.plan.block:
        rest = empty_tail(b, kv_heads, block, d, asked.k.dtype)
    body = Slots(keys=blank[0], values=blank[1], positions=free)
    if not differentiable:
        body = placed(body, layout.plan.store.place.body)
    return Holding(tokens=body, rest=rest)


def read(
    holding: Holding,
    asked: LayerInputs,
    at: Place,
    layout: Layout,
    turn: Turn = None,
    front: Sequence[Shared] = (),
    differentiable: bool = False,
) -> tuple[Array, Holding]:
    """A chunk in a layer that drops nothing; arguments as of `rolling.read`.

    Returns:
        Attention `[B, H, T, D]`, and what is held behind the chunk.
    """
    body, (b, _, t, _) = holding.tokens, asked.k.shape
    assert isinstance(body, Slots)
    past = attend_earlier(asked, (body, *front), turn)
    out, _ = self_attention(asked, past=past)
    whole = _whole(layout, at.lengths)
    column = at.column + jnp.arange(t)
    mine = jnp.where(column < whole[:, None], asked.positions, EMPTY)
    positions = jnp.broadcast_to(mine[:, None], asked.k.shape[:3])
    blocks = [
        stored(
            codec,
            x,
            positions >= 0,
            positions,
            asked.spec,
            differentiable=differentiable,
        )
        for codec, x in zip(layout.plan.store.codecs, (asked.k, asked.v), strict=True)
    ]
    # All layers' arrays are read above and written below.
    out, blocks, body = jax.lax.optimization_barrier((out, blocks, body))
    where = (jnp.full((b,), at.column), jnp.ones((b,), bool), turn)
    body = dataclasses.replace(
        body,
        keys=body.keys.put(blocks[0], *where),
        values=body.values.put(blocks[1], *where),
        positions=put_positions(body.positions, positions, *where),
    )
    rest = holding.rest
    if rest is not None:
        index = whole[:, None] - at.column + jnp.arange(layout.plan.block)
        waits = (index >= 0) & (index < t) & (index < (at.lengths - at.column)[:, None])
        left = asked.taken(jnp.clip(index, 0, t - 1), waits)
        rest = rest.append(left.k, left.v, left.positions, turn)
    return out, Holding(tokens=body, rest=rest)


def cache_of(
    holding: Holding,
    layout: Layout,
    lengths: Lengths,
    room: int,
    spec: LayerSpec,
    dtype: Any,
) -> LayerCache:
    """The cache of such layers, which `holding` has with a first axis.

    Args:
        holding: behind the last chunk.
        layout: what is done.
        lengths: tokens of each row.
        room: later tokens that must fit.
        spec: of the layers.
        dtype: of keys and values.
    """
    plan, body, tail, growth = layout.plan, holding.tokens, holding.rest, None
    assert isinstance(body, Slots)
    layers, b, kv_heads, _ = body.positions.shape
    if tail is not None:
        keys, values = plan.store.codecs
        growth = Growth(block=plan.block, keys=keys, values=values)
        filled = jnp.broadcast_to(_whole(layout, lengths), (layers, b))
        body = dataclasses.replace(body, filled=filled)
    else:
        blank = empty_tail(b, kv_heads, room, spec.head_dim, dtype)
        tail = jax.tree.map(lambda x: jnp.broadcast_to(x, (layers, *x.shape)), blank)
    # What wants tokens as they were is read in chunks only where they are plain.
    if plan.read.whole:
        parts = (body,)
    elif plan.store.place.body == "device":
        parts = jax.vmap(lambda one: plan.read.index(one, one, (), spec))(body)
    else:  # one layer at a time is fetched
        found = jax.lax.map(lambda one: _without(plan.read, one, spec), body)
        first = dataclasses.replace(found[0], keys=body.keys, values=body.values)
        parts = (first, *found[1:])
    return LayerCache(parts=parts, tail=tail, growth=growth, spec=spec)


def _without(read: AbstractRead, body: Slots, spec: LayerSpec) -> tuple[Any, ...]:
    """What `read` knows of one layer's body, which itself is left out."""
    body = placed(body, "device")
    first, *others = read.index(body, body, (), spec)
    none: dict[str, Any] = {"keys": None, "values": None}
    return (dataclasses.replace(first, **none), *others)  # type: ignore[type-var]


def _whole(layout: Layout, lengths: Lengths) -> Lengths:
    """Tokens of each row that are stored: of whole blocks, where there are blocks."""
    block = layout.plan.block
    return lengths // block * block if block else lengths
