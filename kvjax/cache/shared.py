"""A prefix that all rows of a batch have in common, held once."""

import dataclasses
from typing import Self, final

import jax.numpy as jnp

from kvjax.cache.parts import AbstractPart
from kvjax.pallas_kernels.partial import Partial
from kvjax.turns import Turn
from kvjax.types import pytree, static


@final
@pytree
class Shared(AbstractPart):
    """Tokens that all rows have in front of their own, held once.

    Layers may be in other groups than those of the part: the layer at `turn` of its
    group is at `first + stride * turn` in the part, so that nothing is copied.

    Attributes:
        part: of one row; it never changes.
        rows: of the batch.
        first, stride: where layers are in the part.
    """

    part: AbstractPart
    rows: int = static()
    first: int = static(default=0)
    stride: int = static(default=1)

    @classmethod
    def of(cls, part: AbstractPart, rows: int) -> "Shared":
        """A part of one row for `rows`; one that is shared already is held once."""
        if isinstance(part, Shared):
            return dataclasses.replace(part, rows=rows)
        return cls(part=part, rows=rows)

    def among(self, turns: range) -> Self:
        """Those of some layers: `turns` are their places in this one's group."""
        first, stride = self.first + self.stride * turns.start, self.stride * turns.step
        return dataclasses.replace(self, first=first, stride=stride)

    @property
    def positions(self):  # type: ignore[override]
        """Of the one row."""
        return self.part.positions

    def _turn(self, turn: Turn) -> Turn:
        """Where the layer at `turn` is in the part."""
        return None if turn is None else self.first + self.stride * turn

    def attend(self, q, q_positions, spec, limit=None, turn=None):
        del limit
        # The queries of all rows are those of one row.
        b, h, t, d = q.shape
        asked = jnp.moveaxis(q, 1, 0).reshape(1, h, b * t, d)
        at = (q_positions.reshape(1, b * t), spec, None, self._turn(turn))
        read = self.part.attend(asked, *at)
        out = jnp.moveaxis(read.out.reshape(h, b, t, d), 0, 1)
        return Partial(out, jnp.moveaxis(read.lse.reshape(h, b, t), 0, 1))

    def layer(self, turn):
        part = self.part.layer(self.first + self.stride * turn)
        return Shared(part=part, rows=self.rows)

    def live_positions(self, turn=None):
        at = None if turn is None else self.first + self.stride * turn
        return self.part.live_positions(at) * self.rows
