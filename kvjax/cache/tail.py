"""The newest tokens of a layer, plain and in arrival order."""

import dataclasses
import math
from typing import Self, final

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from kvjax.cache.parts import AbstractPart, by_head
from kvjax.codecs.base import put_block
from kvjax.pallas_kernels.partial import nothing_seen
from kvjax.pallas_kernels.slots import attend_block, slot_mask
from kvjax.turns import Turn, at_rows, put, take
from kvjax.types import EMPTY, pytree

CUT = 16
"""Slots of a tail that is no longer appended to are a multiple of it: few programs."""


@final
@pytree
class Tail(AbstractPart):
    """Recent tokens, plain, in arrival order: `[B, K, R, D]`.

    `used [B]` slots of a row are taken; the next token goes to slot `used`. Of no slots
    at all nothing is read, and any token is one too many.
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
        if not self.capacity:
            return nothing_seen(q)
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
        used = take(self.used, turn)
        fresh = jnp.sum(positions >= 0, axis=-1, dtype=jnp.int32)
        held = jnp.broadcast_to(positions[:, None, :], k.shape[:3])

        def placed(old: Array, new: Array) -> Array:
            return self.put(old, new, positions, used, turn)

        return dataclasses.replace(
            self,
            keys=placed(self.keys, k),
            values=placed(self.values, v),
            positions=placed(self.positions, held),
            used=put(self.used, used + fresh, turn),
        )

    def put(
        self,
        x: Array,
        new: Shaped[Array, "B K T *rest"],
        positions: Int[Array, "B T"],
        used: Int[Array, "B"],
        turn: Turn = None,
    ) -> Array:
        """`x`, of the tokens held, with what belongs to new ones in their slots.

        Args:
            x: of the tokens held, `[*layers, B, K, R, *rest]`.
            new: of the new ones.
            positions: theirs; padding (`EMPTY`) comes last.
            used: slots taken before them.
            turn: which layer's, where arrays are those of several.
        """
        b, kv_heads, t, *rest = new.shape
        if not self.capacity:
            return x
        if t > 1:
            slot = used[:, None] + jnp.arange(t)
            slot = jnp.where(positions >= 0, slot, self.capacity)  # dropped
            index = (jnp.arange(b)[:, None], slice(None), slot)
            return at_rows(x, index, jnp.moveaxis(new, 2, 1), turn)
        on = (positions[:, 0] >= 0) & (used < self.capacity)
        flat = x.reshape(*x.shape[: x.ndim - len(rest)], math.prod(rest))
        block = new.reshape(b, kv_heads, 1, math.prod(rest))
        at = (jnp.minimum(used, self.capacity - 1), on, turn)
        return put_block(flat, block, *at).reshape(x.shape)

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

    @property
    def taken(self) -> Self:
        """Without free slots, to the next `CUT`; outside of `jit`, where that is known.

        For a tail that nothing is appended to.
        """
        if isinstance(self.used, jax.core.Tracer):
            return self
        used = -(-int(np.asarray(self.used).max(initial=0)) // CUT) * CUT
        return dataclasses.replace(
            self,
            keys=self.keys[..., :used, :],
            values=self.values[..., :used, :],
            positions=self.positions[..., :used],
        )

    def fresh(self, rows: int, capacity: int) -> "Tail":
        """An empty one for as many layers, of `rows` rows."""
        *layers, _, kv_heads, _, head_dim = self.keys.shape
        blank = empty_tail(rows, kv_heads, capacity, head_dim, self.keys.dtype)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (*layers, *x.shape)), blank)


def empty_tail(batch: int, kv_heads: int, capacity: int, head_dim: int, dtype) -> Tail:
    """A tail with room for `capacity` tokens and none held."""
    shape = (batch, kv_heads, capacity, head_dim)
    return Tail(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        positions=jnp.full(shape[:3], EMPTY, jnp.int32),
        used=jnp.zeros((batch,), jnp.int32),
    )
