"""What a cache holds of a prompt, at the places of its tokens in the row.

So the parallel form is one pass of masked attention (`kvjax.pallas_kernels.held`), as
cheap as the pass without compression.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kvjax.cache import LayerCache, Ragged, Slots
from kvjax.cache.parts import AbstractPart
from kvjax.pallas_kernels.held import Earlier, Stored


def fits(layer: LayerCache, merged: bool) -> bool:
    """Whether the layer is one body of tokens that every query reads whole.

    Not so where queries choose pages, where some tokens have no value, where the body
    evicts while decoding, and where tokens that wait to be encoded are `merged`, since
    they are not what they were.
    """
    one = len(layer.parts) == 1 and isinstance(layer.parts[0], Slots | Ragged)
    return one and layer.folding is None and not (merged and layer.growth is not None)


def earlier_tokens(
    body: AbstractPart,
    edge: Int[Array, "B T"],
    layer: LayerCache,
    changed: bool,
    behind: Bool[Array, "B T"],
) -> Earlier:
    """What the tokens behind the compression point see of those before it.

    Args:
        body: with decoded keys and values; if it grows, with all it will ever hold.
        edge: of each query that is behind: it reads slots below as they are stored.
        layer: whose body that is.
        changed: whether it holds anything but tokens as they were.
        behind: which tokens are behind their row's point.
    """
    assert isinstance(body, Slots | Ragged)
    tokens, kv_heads = behind.shape[1], layer.spec.num_kv_heads
    at = _tokens_of(body, tokens)

    def placed(x: Array) -> Array:
        shape = (x.shape[0], kv_heads, tokens, *x.shape[body.positions.ndim :])
        return jnp.zeros(shape, x.dtype).at[at].set(x, mode="drop")

    kept = placed(jnp.ones(body.positions.shape, bool))
    if not changed:
        return Earlier(behind=behind, kept=kept)
    slot = jnp.zeros(body.positions.shape, jnp.int32)
    if layer.growth is not None:
        slot = jnp.broadcast_to(jnp.arange(slot.shape[-1]), slot.shape)
    never = jnp.iinfo(jnp.int32).max  # what has no slot is read plain
    rope = layer.spec.rope
    stored = Stored(
        keys=placed(body.keys.decode(body.positions, rope)),
        values=placed(body.values.decode(body.positions, rope)),
        slot=placed(slot - never) + never,
        edge=jnp.where(behind, edge, 0),
    )
    return Earlier(behind=behind, kept=kept, stored=stored)


def _tokens_of(body: Slots | Ragged, tokens: int) -> tuple[Array, ...]:
    """Row, head and token of every slot; free slots are at token `tokens`."""
    at = jnp.where(body.positions >= 0, body.positions, tokens)
    row = jnp.arange(at.shape[0])
    if isinstance(body, Ragged):
        return row[:, None], body.heads, at
    return row[:, None, None], jnp.arange(at.shape[1])[:, None], at
