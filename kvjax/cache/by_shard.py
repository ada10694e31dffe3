"""Flat buffers of heads on several devices: one for the heads of each."""

import dataclasses
from typing import final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from kvjax.cache.parts import AbstractPart
from kvjax.cache.ragged import Ragged
from kvjax.pallas_kernels.partial import Partial
from kvjax.types import pytree, static


@final
@pytree
class ByShard(AbstractPart):
    """`Ragged`, cut between heads into `ways` pieces of one length.

    A row of `part` is one piece of the KV heads, `K / ways` of them, and a row of the
    batch, in this order: so a device that has some heads and some rows has neighbouring
    rows of `part`, and attends to them as to any buffer. Elsewhere all of it is read.

    Attributes:
        part: of `ways * B` rows.
        ways: pieces.
    """

    part: Ragged
    ways: int = static()

    @property
    def positions(self):  # type: ignore[override]
        """Of all pieces, `[ways * B, N]`."""
        return self.part.positions

    def attend(self, q, q_positions, spec, limit=None, turn=None):
        del limit
        b, h, t, d = q.shape
        rows = folded(q, self.ways)
        at = jnp.tile(q_positions, (self.ways, 1))
        local = dataclasses.replace(
            spec,
            num_heads=spec.num_heads // self.ways,
            num_kv_heads=spec.num_kv_heads // self.ways,
        )
        found = self.part.attend(rows, at, local, None, turn)
        out = found.out.reshape(self.ways, b, -1, t, d)
        lse = found.lse.reshape(self.ways, b, -1, t)
        return Partial(
            jnp.moveaxis(out, 0, 1).reshape(q.shape),
            jnp.moveaxis(lse, 0, 1).reshape(b, h, t),
        )

    def layer(self, turn):
        return dataclasses.replace(self, part=self.part.layer(turn))

    def settled(self):
        return dataclasses.replace(self, part=self.part.settled())

    def live_positions(self, turn=None):
        rows = self.part.live_positions(turn)
        count = len(rows) // self.ways
        return [sum(rows[row::count], []) for row in range(count)]


def folded[T](tree: T, ways: int) -> T:
    """Arrays `[B, K, ...]` as those of pieces of heads, `[ways * B, K / ways, ...]`."""

    def fold(x: Shaped[Array, "B K *rest"]) -> Array:
        b, heads, *rest = x.shape
        apart = jnp.moveaxis(x.reshape(b, ways, heads // ways, *rest), 1, 0)
        return apart.reshape(ways * b, heads // ways, *rest)

    return tree if ways == 1 else jax.tree.map(fold, tree)
