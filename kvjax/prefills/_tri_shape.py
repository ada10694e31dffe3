"""The first tokens, the newest ones, and all for the last queries."""

import dataclasses
from typing import final

import jax.numpy as jnp

from kvjax.config import sized
from kvjax.fields import Count, Positive
from kvjax.prefills._a_shape import triangle
from kvjax.prefills.chosen import Chosen
from kvjax.prefills.pattern import AbstractPattern
from kvjax.types import LayerInputs, Lengths


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class TriShape(AbstractPattern):
    """As `AShape`, but the last queries of a prompt see all of it.

    Attributes:
        first: tokens at the start that all see.
        local: newest tokens that each sees, itself among them.
        last: queries at the end of the prompt that see everything.

    Source: SCBench (2412.10319), `tri_shape_kernel` (128 / 3968 / 100).
    Deviations: whole blocks, of queries too: up to a block more of each. The last
    queries go through the same kernel as the others.
    """

    first: Count = sized(128, short=8)
    local: Positive = sized(3968, short=24)
    last: Count = sized(100, short=8)

    def choose(self, inputs: LayerInputs, lengths: Lengths) -> Chosen:
        """See `AbstractPattern`."""
        n = -(-inputs.positions.shape[1] // self.block)
        end = (jnp.arange(n) + 1) * self.block
        full = (end > lengths[:, None] - self.last)[:, None, :, None]
        if not self.last:
            full = jnp.zeros_like(full)
        blocks = triangle(n, self.block, self.first, self.local) | full
        return Chosen(blocks=blocks, block=self.block)
