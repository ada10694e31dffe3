"""One flat buffer for the heads of a layer, or of all layers, each its own length."""

import math
from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kvjax.cache.blocks import BLOCK, over_blocks
from kvjax.cache.parts import AbstractPart, attend_stored, served
from kvjax.codecs import AbstractEncoded, OnHost
from kvjax.pallas_kernels.partial import Partial, cap, softmax_partial
from kvjax.pallas_kernels.slots import slot_mask
from kvjax.turns import cut, take
from kvjax.types import EMPTY, pytree, static


@final
@pytree
class Ragged(AbstractPart):
    """One flat buffer for all heads of a layer, or of several: `[B, N, D]`.

    Head `k` of a layer owns the slots `offsets[b, k] .. offsets[b, k + 1]`. How many
    that is may depend on the data, but their sum over all layers does not: head-wise
    budgets free memory, and so do budgets that differ by layer.

    `widest` is the most slots that a layer of several can own; 0 in a buffer of one
    layer. Slots that nobody owns are free.
    """

    keys: AbstractEncoded
    values: AbstractEncoded
    positions: Int[Array, "B N"]
    offsets: Int[Array, "*layers B K+1"]
    widest: int = static(default=0)

    @property
    def heads(self) -> Int[Array, "B N"]:
        """KV head of every slot, of one layer (slots past the last: the last head)."""
        index = jnp.arange(self.positions.shape[-1])[None, :, None]
        owner = jnp.sum(index >= self.offsets[:, None, 1:], axis=-1)
        return jnp.minimum(owner, self.offsets.shape[-1] - 2)

    def layer(self, turn):
        if not self.widest:
            return self
        offsets = np.asarray(self.offsets[turn])
        first, width = offsets[:, 0], int((offsets[:, -1] - offsets[:, 0]).max())
        multiple = math.lcm(self.keys.block_multiple, self.values.block_multiple)
        width = max(-(-width // multiple), 1) * multiple
        start = np.minimum(first, self.positions.shape[-1] - width)
        keys, values, positions = self._piece(jnp.asarray(start), width)
        slot = start[:, None] + np.arange(width)
        mine = (slot >= first[:, None]) & (slot < offsets[:, -1:])
        return Ragged(
            keys=keys,
            values=values,
            positions=jnp.where(mine, positions, EMPTY),
            offsets=jnp.asarray(offsets - start[:, None]),
        )

    def _piece(
        self, start: Int[Array, "B"], width: int
    ) -> tuple[AbstractEncoded, AbstractEncoded, Int[Array, "B W"]]:
        """`width` slots of each row from its `start` on."""

        def row(keys, values, positions, start):
            cut_ = cut(positions, start, width, -1, None)
            return keys.block(start, width), values.block(start, width), cut_

        given = (self.keys, self.values, self.positions, start)
        if isinstance(self.keys, OnHost):  # what lies there is cut row by row
            return jax.lax.map(lambda one: row(*one), given)
        return jax.vmap(row)(*given)

    def attend(self, q, q_positions, spec, limit=None, turn=None):
        del limit
        offsets = take(self.offsets, turn)
        if served(q, self.keys, self.values):
            held = offsets[:, 1:] - offsets[:, :-1]
            body = (self.keys, self.values, self.positions)
            return attend_stored(q, q_positions, *body, spec, held, offsets)
        slots = self.positions.shape[-1]
        first = jnp.zeros_like(offsets[:, 0])
        if self.widest and turn is not None:  # a piece as wide as the widest
            total, slots = slots, min(slots, self.widest)
            first = jnp.minimum(offsets[:, 0], total - slots)

        def attend(start, width: int) -> Partial:
            at = first + start
            keys, values, here = self._piece(at, width)
            slot = at[:, None] + jnp.arange(width)
            mine = (slot >= offsets[:, :1]) & (slot < offsets[:, -1:])
            here = jnp.where(mine, here, EMPTY)
            live = (here >= 0)[..., None]
            keys, values = (
                jnp.where(live, x.decode(here, spec.rope), 0) for x in (keys, values)
            )
            owner = jnp.sum(slot[..., None] >= offsets[:, None, 1:], axis=-1)
            return self._attend(q, q_positions, spec, keys, values, here, owner)

        # A flat slot is one head's: blocks of as many bytes as elsewhere.
        block = BLOCK * (offsets.shape[-1] - 1)
        multiple = math.lcm(self.keys.block_multiple, self.values.block_multiple)
        return over_blocks(attend, slots, multiple, q.shape, block)

    def _attend(self, q, q_positions, spec, keys, values, positions, owner):
        """Attention over some slots, the free ones cleared."""
        # All heads' queries against the flat buffer, masked to the owner: one GEMM
        # per row. The buffer is read once; the extra products are cheap beside it.
        kv_heads = self.offsets.shape[-1] - 1
        own = owner[:, None, :] == jnp.arange(kv_heads)[:, None]
        flat = jnp.where(own, positions[:, None, :], EMPTY)  # [B, K, N]
        (b, h, t, d), n = q.shape, positions.shape[-1]
        rows = q.reshape(b, h * t, d).astype(keys.dtype)
        logits = jnp.einsum("BXD,BND->BXN", rows, keys, preferred_element_type="f4")
        logits = cap(logits.reshape(b, kv_heads, -1, t, n) * spec.scale, spec.softcap)
        mask = slot_mask(q_positions, flat, spec.window)[:, :, None]
        mask = jnp.broadcast_to(mask, logits.shape)
        part = softmax_partial(
            logits.reshape(b, h * t, n), mask.reshape(b, h * t, n), values
        )
        return Partial(part.out.reshape(b, h, t, d), part.lse.reshape(b, h, t))

    def live_positions(self, turn=None):
        positions, offsets = np.asarray(self.positions), np.asarray(self.offsets)
        offsets = offsets if turn is None else offsets[turn]
        rows = []
        for held, edge in zip(positions, offsets, strict=True):
            heads = [held[a:b] for a, b in zip(edge[:-1], edge[1:], strict=True)]
            rows.append([head[head >= 0] for head in heads])
        return rows
