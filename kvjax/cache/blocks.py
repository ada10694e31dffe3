"""Attention over a part's slots without a decoded copy of them."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kvjax.codecs import AbstractEncoded
from kvjax.pallas_kernels.partial import Partial, merge
from kvjax.pallas_kernels.slots import attend_block, slot_mask
from kvjax.turns import Turn, cut
from kvjax.types import NEG_INF, LayerSpec

BLOCK = 1024
"""Slots decoded at a time; bounds a decode step's temporaries."""


def attend_blocks(
    q: Array,
    q_positions: Array,
    keys: AbstractEncoded,
    values: AbstractEncoded,
    positions: Int[Array, "*layers B K S"],
    spec: LayerSpec,
    limit: Int[Array, "B T"] | None = None,
    turn: Turn = None,
) -> Partial:
    """Attention over encoded slots, decoded block by block.

    For what `decode_attention` does not take: many queries, a limit per query, or
    codecs that kernels cannot read. The decoded keys and values of one block live at
    a time, so there is never a plain copy of the cache.
    """
    how: dict[str, Any] = {"scale": spec.scale, "softcap": spec.softcap}
    multiple = math.lcm(keys.block_multiple, values.block_multiple)

    def attend(start, width: int) -> Partial:
        here = cut(positions, start, width, -1, turn)
        mask = slot_mask(q_positions, here, spec.window)
        if limit is not None:
            mask = mask & (start + jnp.arange(width) < limit[:, None, :, None])
        k = keys.block(start, width, turn).decode(here, spec.rope)
        v = values.block(start, width, turn).decode(here, spec.rope)
        return attend_block(q, k, v, mask, **how)

    def filled(start, width: int) -> Bool[Array, ""]:
        return jnp.any(cut(positions, start, width, -1, turn) >= 0)

    return over_blocks(attend, positions.shape[-1], multiple, q.shape, filled=filled)


def over_blocks(
    attend: Callable[[Any, int], Partial],
    slots: int,
    multiple: int,
    shape: tuple[int, ...],
    block: int = BLOCK,
    filled: Callable[[Any, int], Bool[Array, ""]] | None = None,
) -> Partial:
    """`attend(start, width)` over all slots, about `block` of them at a time.

    Args:
        attend: attention over some slots; `start` may be traced.
        slots: how many there are.
        multiple: of `start` and `width`.
        shape: of the queries.
        block: slots at a time.
        filled: whether there is anything in some slots: others are not read.
    """
    size = max(multiple, block // multiple * multiple)
    if slots < 2 * size:
        return attend(0, slots)

    def step(carry, index):
        start = index * size

        def more():
            return merge([carry, attend(start, size)])

        if filled is None:
            return more(), None
        return jax.lax.cond(filled(start, size), more, lambda: carry), None

    nothing = Partial(jnp.zeros(shape), jnp.full(shape[:-1], NEG_INF))
    done, _ = jax.lax.scan(step, nothing, jnp.arange(slots // size))
    rest = slots % size
    return merge([done, attend(slots - rest, rest)]) if rest else done
