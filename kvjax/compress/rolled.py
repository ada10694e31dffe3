"""Plain tokens that a layer holds between two chunks, and which of them stay."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt8

from kvjax.compress.survey import Layout
from kvjax.types import EMPTY, LayerInputs, pytree


@pytree
class Rolled:
    """Plain tokens between two chunks; of several layers, with a first axis.

    Attributes:
        keys: after RoPE.
        values: of the same tokens.
        positions: theirs; a slot is free where `EMPTY`.
        offsets: where the heads of a layer share its slots, and there is no axis for
            heads: the first slot of each, and the end; else None.
    """

    keys: Array  # [*layers, B, K, C, D]
    values: Array  # [*layers, B, K, C, D]
    positions: Array  # [*layers, B, K, C]
    offsets: Int[Array, "*layers B K+1"] | None = None


def joined(held: Rolled, asked: LayerInputs) -> Rolled:
    """What is held by every head, and behind it the new tokens."""
    own = jnp.broadcast_to(asked.positions[:, None], asked.k.shape[:3])
    pairs = zip(
        (held.keys, held.values, held.positions), (asked.k, asked.v, own), strict=True
    )
    k, v, at = (jnp.concatenate(pair, axis=2) for pair in pairs)
    return Rolled(keys=k, values=v, positions=at)


def kept_of(both: Rolled, kept: Bool[Array, "B K S"], layout: Layout) -> Rolled:
    """Only the tokens that stay, in the layer's slots."""
    index = index_of(kept, layout)
    live = index < kept[0].size if layout.shared else index < kept.shape[-1]
    offsets = None
    if layout.shared:
        ends = jnp.cumsum(jnp.sum(kept, axis=-1, dtype=jnp.int32), axis=-1)
        offsets = jnp.pad(ends, [(0, 0), (1, 0)])
    return Rolled(
        keys=jnp.where(live[..., None], moved(both.keys, index), 0),
        values=jnp.where(live[..., None], moved(both.values, index), 0),
        positions=jnp.where(live, moved(both.positions, index), EMPTY),
        offsets=offsets,
    )


def index_of(kept: Bool[Array, "B K S"], layout: Layout) -> Array:
    """The token of each slot, in the order of the tokens; beyond the last where none.

    Of every head, `[B, K, C]`; where heads share, of all heads one behind the other,
    `[B, C]`.
    """
    lead = kept.shape[:1] if layout.shared else kept.shape[:2]
    flat = kept.reshape(*lead, -1)
    count = flat.shape[-1]
    index = jnp.sort(jnp.where(flat, jnp.arange(count), count), axis=-1)
    short = max(0, layout.slots - count)
    index = jnp.pad(index, [(0, 0)] * len(lead) + [(0, short)], constant_values=count)
    return index[..., : layout.slots]


def moved(x: Array, index: Array) -> Array:
    """`[B, K, S, ...]` of all tokens as that of the slots."""
    lead = index.ndim - 1
    x = x.reshape(*x.shape[:lead], -1, *x.shape[3:])
    index = jnp.minimum(index, x.shape[lead] - 1)
    index = index.reshape(*index.shape, *(1,) * (x.ndim - index.ndim))
    return jnp.take_along_axis(x, index, axis=lead)


def packed(kept: Bool[Array, "*shape S"]) -> UInt8[Array, "*shape P"]:
    """Eight decisions in a byte."""
    return jnp.packbits(kept, axis=-1)


def unpacked(bits: UInt8[Array, "*shape P"], slots: int) -> Bool[Array, "*shape S"]:
    """The decisions of `packed`, of which there were `slots`."""
    return jnp.unpackbits(bits, axis=-1, count=slots).astype(bool)
