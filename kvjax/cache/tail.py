"""The newest tokens of a layer, plain and in arrival order."""

import dataclasses
from typing import Self, final

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.parts import AbstractPart, by_head, put_positions
from kvjax.codecs.base import put_block
from kvjax.pallas_kernels.slots import attend_block, slot_mask
from kvjax.turns import Turn, at_rows, put, take
from kvjax.types import EMPTY, pytree


@final
@pytree
class Tail(AbstractPart):
    """Recent tokens, plain, in arrival order: `[B, K, R, D]`.

    `used [B]` slots of a row are taken; the next token goes to slot `used`.
    """

    keys: Float[Array, "*layers B K R D"]
    values: Float[Array, "*layers B K R D"]
    positions: Int[Array, "*layers B K R"]
    used: Int[Array, "*layers B"]

    @property
    def capacity(self) -> int:
        """Slots `R`."""
        return self.positions.shape[-1]

    def attend(self, q, q_positions, spec, limit=None, turn=None):
        del limit
        mine = take(self, turn)
        return attend_block(
            q,
            mine.keys,
            mine.values,
            slot_mask(q_positions, mine.positions, spec.window),
            scale=spec.scale,
            softcap=spec.softcap,
        )

    def live_positions(self, turn=None):
        return by_head(take(self.positions, turn))

    def append(
        self, k: Array, v: Array, positions: Int[Array, "B T"], turn: Turn = None
    ) -> Self:
        """Write tokens behind the used slots; padding (`EMPTY`) must come last.

        Tokens that do not fit are not written; `overflow` tells.
        """
        b, kv_heads, t, _ = k.shape
        used = take(self.used, turn)
        if t == 1:
            return self._append_one(k, v, positions, used, turn)
        slot = used[:, None] + jnp.arange(t)
        slot = jnp.where(positions >= 0, slot, self.capacity)  # dropped
        index = (jnp.arange(b)[:, None], slice(None), slot)
        fresh = jnp.sum(positions >= 0, axis=-1, dtype=jnp.int32)
        held = jnp.broadcast_to(positions[:, :, None], (b, t, kv_heads))
        return dataclasses.replace(
            self,
            keys=at_rows(self.keys, index, jnp.moveaxis(k, 1, 2), turn),
            values=at_rows(self.values, index, jnp.moveaxis(v, 1, 2), turn),
            positions=at_rows(self.positions, index, held, turn),
            used=put(self.used, used + fresh, turn),
        )

    def _append_one(self, k, v, positions, used, turn: Turn) -> Self:
        """The same for one token of each row."""
        on = (positions[:, 0] >= 0) & (used < self.capacity)
        at = (jnp.minimum(used, self.capacity - 1), on, turn)
        held = jnp.broadcast_to(positions[:, None, :], k.shape[:3])
        fresh = (positions[:, 0] >= 0).astype(jnp.int32)
        return dataclasses.replace(
            self,
            keys=put_block(self.keys, k, *at),
            values=put_block(self.values, v, *at),
            positions=put_positions(self.positions, held, *at),
            used=put(self.used, used + fresh, turn),
        )

    def emptied(self, rows: Bool[Array, "B"], turn: Turn = None) -> Self:
        """Without the tokens of the given rows."""
        positions, used = take((self.positions, self.used), turn)
        positions = jnp.where(rows[:, None, None], EMPTY, positions)
        used = jnp.where(rows, 0, used)
        return dataclasses.replace(
            self,
            positions=put(self.positions, positions, turn),
            used=put(self.used, used, turn),
        )


def empty_tail(batch: int, kv_heads: int, capacity: int, head_dim: int, dtype) -> Tail:
    """A tail with room for `capacity` tokens and none held."""
    shape = (batch, kv_heads, capacity, head_dim)
    return Tail(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        positions=jnp.full(shape[:3], EMPTY, jnp.int32),
        used=jnp.zeros((batch,), jnp.int32),
    )
