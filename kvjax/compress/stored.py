"""What becomes of tokens that stay: the form they are held in, and what joins them."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kvjax.cache import Memory, present
from kvjax.codecs import AbstractCodec, AbstractEncoded, PlainArray, straight_through
from kvjax.compress.eviction import Eviction
from kvjax.types import Held, LayerSpec


def stored(
    codec: AbstractCodec,
    x: Array,
    live: Bool[Array, "*lead S"],
    positions: Int[Array, "*lead S"],
    spec: LayerSpec,
    side: Any = None,
    *,
    differentiable: bool = False,
) -> AbstractEncoded:
    """Codes of `x`, or in the parallel form what they decode to.

    Args:
        codec: how.
        x: `[*lead, S, D]` keys after RoPE, or values.
        live: which slots count.
        positions: absolute ones.
        spec: of the layer.
        side: what the codec has observed.
        differentiable: hold decoded arrays with straight-through gradients.
    """
    x = jnp.where(live[..., None], x, 0)
    encoded = codec.encode(x, live, positions, spec.rope, side)
    if not differentiable or codec.plain:
        return encoded
    decoded = encoded.decode(positions, spec.rope)
    if codec.differentiable:
        return PlainArray(data=jnp.where(live[..., None], decoded, 0))
    return PlainArray(data=straight_through(x, decoded))


def merged(
    evict: Eviction,
    memory: Memory,
    held: Held,
    kept: Bool[Array, "B K S"],
    counts: Int[Array, "B"],
) -> tuple[Array, Array]:
    """Keys and values with those of dropped tokens put into those that are kept.

    Args:
        evict: its merge says how.
        memory: of the score.
        held: all tokens.
        kept: which of them stay.
        counts: tokens per head that the budget gives.
    """
    assert evict.merge is not None
    # Of the layer's own tokens: priorities may be ranks, or an earlier layer's.
    scores = evict.score.score(memory, held, counts)
    scores = evict.score.unprotected(memory, held, scores)
    held = present(held)
    return evict.merge.merged(held, kept & held.live, scores.astype(jnp.float32))
