"""The newest tokens of a layer, plain and in arrival order."""

import dataclasses
from typing import Self, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache.parts import AbstractPart, by_head
from kvjax.pallas_kernels.slots import attend_block, slot_mask
from kvjax.types import EMPTY, pytree


@final
@pytree
class Tail(AbstractPart):
    """Recent tokens, plain, in arrival order: `[B, K, R, D]`.

    `used [B]` slots of a row are taken; the next token goes to slot `used`.
    """

    keys: Float[Array, "B K R D"]
    values: Float[Array, "B K R D"]
    positions: Int[Array, "B K R"]
    used: Int[Array, "B"]

    @property
    def capacity(self) -> int:
        """Slots `R`."""
        return self.positions.shape[-1]

    def attend(self, q, q_positions, spec, limit=None):
        del limit
        return attend_block(
            q,
            self.keys,
            self.values,
            slot_mask(q_positions, self.positions, spec.window),
            scale=spec.scale,
            softcap=spec.softcap,
        )

    def live_positions(self):
        return by_head(self.positions)

    def append(self, k: Array, v: Array, positions: Int[Array, "B T"]) -> Self:
        """Write tokens behind the used slots; padding (`EMPTY`) must come last.

        Tokens that do not fit are not written; `overflow` tells.
        """
        b, kv_heads, t, _ = k.shape
        fresh = jnp.sum(positions >= 0, axis=-1, dtype=jnp.int32)
        if t == 1:
            at = jnp.minimum(self.used, self.capacity - 1)
            room = (self.used < self.capacity) & (fresh > 0)

            def put(x, new, start, on):
                old = jax.lax.dynamic_slice_in_dim(x, start, 1, axis=1)
                new = jnp.where(on, new.astype(x.dtype), old)
                return jax.lax.dynamic_update_slice_in_dim(x, new, start, axis=1)

            write = jax.vmap(put)
            new_positions = jnp.broadcast_to(positions[:, None], (b, kv_heads, 1))
            return dataclasses.replace(
                self,
                keys=write(self.keys, k, at, room),
                values=write(self.values, v, at, room),
                positions=write(self.positions, new_positions, at, room),
                used=self.used + fresh,
            )
        slot = self.used[:, None] + jnp.arange(t)[None]
        slot = jnp.where(positions >= 0, slot, self.capacity)  # dropped by the scatter
        row = jnp.arange(b)[:, None]
        return dataclasses.replace(
            self,
            keys=self.keys.at[row, :, slot].set(
                jnp.moveaxis(k, 1, 2).astype(self.keys.dtype), mode="drop"
            ),
            values=self.values.at[row, :, slot].set(
                jnp.moveaxis(v, 1, 2).astype(self.values.dtype), mode="drop"
            ),
            positions=self.positions.at[row, :, slot].set(
                positions[:, :, None].astype(jnp.int32), mode="drop"
            ),
            used=self.used + fresh,
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
