"""The first tokens and the newest ones."""

import dataclasses
from typing import final

import jax.numpy as jnp

from kvjax.config import sized
from kvjax.fields import Count, Positive
from kvjax.prefills.chosen import Chosen
from kvjax.prefills.pattern import AbstractPattern
from kvjax.types import LayerInputs, Lengths


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class AShape(AbstractPattern):
    """A query sees the first tokens of the prompt and those just before it.

    Attributes:
        first: tokens at the start that all see.
        local: newest tokens that each sees, itself among them.

    Source: StreamingLLM's mask (2309.17453) in prefill, as A-shape in MInference
    (2407.02490; 128 / 3968).
    Deviations: whole blocks that hold such a pair, so up to a block more on either
    side; with `block=1` exactly these tokens.
    """

    first: Count = sized(128, short=8)
    local: Positive = sized(3968, short=24)

    def choose(self, inputs: LayerInputs, lengths: Lengths) -> Chosen:
        """See `AbstractPattern`."""
        del lengths
        n = -(-inputs.positions.shape[1] // self.block)
        blocks = triangle(n, self.block, self.first, self.local)
        far = (self.local + self.block - 2) // self.block  # of the diagonals of blocks
        most = -(-self.first // self.block) + far + 1
        return Chosen(blocks=blocks[None, None], block=self.block, most=most)


def triangle(count: int, block: int, first: int, local: int):
    """Pairs of blocks that hold one of the `first` keys or a pair nearer than `local`.

    Returns:
        `[N, N]`, query block by key block.
    """
    index = jnp.arange(count)
    offset = index[:, None] - index
    nearest = jnp.maximum((offset - 1) * block + 1, 0)  # of all pairs of two blocks
    return (index * block < first) | (nearest < local)
