"""The blocks with the best means."""

import dataclasses
from typing import final

import jax.numpy as jnp

from kvjax.config import sized
from kvjax.fields import Positive
from kvjax.prefills.chosen import Chosen, visible_blocks
from kvjax.prefills.pattern import AbstractPattern
from kvjax.prefills.ranking import highest, mean_logits
from kvjax.types import NEG_INF, LayerInputs, Lengths


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockTopK(AbstractPattern):
    """Each block of queries sees the key blocks whose mean is nearest to its own.

    Attributes:
        blocks: key blocks that a block of queries sees, its own among them.

    Source: MInference (2407.02490) section 3, block-sparse heads: 100 blocks of 64 by
    the product of mean-pooled queries and keys.
    Deviations: 50 blocks of 128, as TPUs want them. A block's own keys are always among
    those: without them a query that a sliding window keeps from all others would see
    nothing. Means of a last block are those of its tokens, not of zeros behind them.
    Blocks outside of a window are not chosen.

    Cost: products of `(S / block) ** 2` means, and as many numbers per head.
    """

    blocks: Positive = sized(50, short=4)

    def choose(self, inputs: LayerInputs, lengths: Lengths) -> Chosen:
        """See `AbstractPattern`."""
        logits = mean_logits(inputs, lengths, self.block)
        n = logits.shape[-1]
        seen = visible_blocks(lengths, n, self.block, inputs.spec.window)
        logits = jnp.where(jnp.eye(n, dtype=bool), jnp.inf, logits)
        kept = highest(jnp.where(seen, logits, NEG_INF), self.blocks)
        return Chosen(blocks=kept, block=self.block, most=self.blocks)
