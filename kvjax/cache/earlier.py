"""Attention of many tokens over parts that are in front of all of them."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array

from kvjax.cache.blocks import BLOCK
from kvjax.cache.parts import AbstractPart, Slots
from kvjax.cache.shared import Shared
from kvjax.pallas_kernels.dense import map_query_chunks, query_chunk
from kvjax.pallas_kernels.partial import Partial, merge
from kvjax.turns import Turn
from kvjax.types import LayerInputs


def attend_earlier(
    asked: LayerInputs, parts: Sequence[AbstractPart], turn: Turn = None
) -> Partial:
    """What the queries of `asked` find in `parts`, some queries at a time.

    Args:
        asked: the tokens, all of them behind what the parts hold.
        parts: at least one.
        turn: which layer's, where parts are those of several.
    """
    b, h, tokens, _ = asked.q.shape

    def read(q: Array, positions: Array) -> tuple[Partial, tuple[()]]:
        how = (jnp.moveaxis(q, 2, 1), positions, asked.spec, None, turn)
        return merge([part.attend(*how) for part in parts]), ()

    chunk = query_chunk(tokens, b * h * max(map(_at_once, parts)))
    q = jnp.moveaxis(asked.q, 1, 2)
    found, _ = map_query_chunks(read, chunk, q, asked.positions)
    return found


def _at_once(part: AbstractPart) -> int:
    """Slots whose logits are in memory at a time."""
    part = part.part if isinstance(part, Shared) else part
    slots = int(part.positions.shape[-1])
    return min(slots, 2 * BLOCK) if isinstance(part, Slots) else slots
