"""What eviction while decoding remembers of tokens and queries."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache.merging import AbstractMerge
from kvjax.cache.parts import Slots
from kvjax.cache.ranking import AbstractRanking
from kvjax.cache.tail import Tail
from kvjax.codecs import PlainArray
from kvjax.pallas_kernels.slots import slot_mask, slot_mass
from kvjax.turns import Turn, put, take
from kvjax.types import LayerInputs, pytree


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
