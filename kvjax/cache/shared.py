"""A prefix that all rows of a batch have in common, held once."""

from typing import final

import jax.numpy as jnp

from kvjax.cache.parts import AbstractPart
from kvjax.pallas_kernels.partial import Partial
from kvjax.types import pytree, static


@final
@pytree
class Shared(AbstractPart):
    """Tokens that all rows have in front of their own, held once.

    Attributes:
        part: of one row; it never changes.
        rows: of the batch.
    """

    part: AbstractPart
    rows: int = static()

    @property
    def positions(self):  # type: ignore[override]
        """Of the one row."""
        return self.part.positions

    def attend(self, q, q_positions, spec, limit=None, turn=None):
        del limit
        # The queries of all rows are those of one row.
        b, h, t, d = q.shape
        asked = jnp.moveaxis(q, 1, 0).reshape(1, h, b * t, d)
        read = self.part.attend(asked, q_positions.reshape(1, b * t), spec, None, turn)
        out = jnp.moveaxis(read.out.reshape(h, b, t, d), 0, 1)
        return Partial(out, jnp.moveaxis(read.lse.reshape(h, b, t), 0, 1))

    def layer(self, turn):
        return Shared(part=self.part.layer(turn), rows=self.rows)

    def live_positions(self, turn=None):
        return self.part.live_positions(turn) * self.rows
