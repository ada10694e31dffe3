"""Contract of sparse patterns: which blocks and columns does a prompt look at?"""

import abc
import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kvjax.attention import self_attention
from kvjax.config import sized
from kvjax.fields import Count, Range
from kvjax.pallas_kernels.partial import PIECE, Partial, merge
from kvjax.prefills.base import AbstractPrefill
from kvjax.prefills.chosen import Chosen, first_tokens, of_rows, own, unchosen
from kvjax.types import LayerInputs, Lengths

DENSE_BELOW = 8192
"""Tokens from which sparse prefill pays on a CPU, by docs/benchmarks.md."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractPattern(AbstractPrefill):
    """A prompt that looks at some blocks of itself.

    A pattern chooses for every row by itself, from the row's own tokens; positions
    count from the row's first, also behind a prefix, which all tokens see in full. The
    choice has no gradient; what is computed has that of `sparse_prefill`. Where a
    scorer wants the mass of every column, dense attention is masked to the same
    pattern.

    Attributes:
        block: queries and keys per block. 1 keeps exactly the chosen tokens, by a mask
            over dense attention.
        dense_below: a row of fewer tokens is read densely, whatever the rows beside
            it: up to there the choice costs more than it saves. 0: never.
    """

    block: Annotated[int, Range(1, 1024)] = sized(128, short=8)
    dense_below: Count = sized(DENSE_BELOW, short=0)

    @abc.abstractmethod
    def choose(self, inputs: LayerInputs, lengths: Lengths) -> Chosen:
        """What the tokens of a prompt see.

        Args:
            inputs: with positions from 0, and zeros in padding.
            lengths: tokens of each row.
        """

    def attend(self, inputs, lengths, mass, past=None):
        inputs, width = own(inputs), inputs.positions.shape[1]
        if width < self.dense_below:
            return self_attention(inputs, mass=mass, past=past)
        short = lengths < self.dense_below
        long = of_rows(inputs, ~short)
        sparse = self._sparse(long, jnp.where(short, 0, lengths), mass, past)
        if not self.dense_below:
            return sparse
        edge = min(width, -(-self.dense_below // PIECE) * PIECE)

        def dense() -> tuple[Array, Array | None]:
            front = past
            if past is not None:
                front = Partial(past.out[:, :, :edge], past.lse[:, :, :edge])
            some = first_tokens(of_rows(inputs, short), edge)
            read = self_attention(some, mass=mass, past=front)

            def put(wide: Array, narrow: Array) -> Array:
                here = short.reshape(-1, *(1,) * (wide.ndim - 1))
                narrow = jnp.where(here, narrow, wide[:, :, :edge])
                return jax.lax.dynamic_update_slice(wide, narrow, (0,) * wide.ndim)

            return jax.tree.map(put, sparse, read)

        # A row is what it is alone; nobody pays for short rows where there are none.
        return jax.lax.cond(jnp.any(short), dense, lambda: sparse)

    def _sparse(self, inputs, lengths, mass, past):
        chosen = self.choose(unchosen(inputs), lengths)
        if mass or self.block == 1:
            return chosen.masked(inputs, mass, past)
        parts = chosen.parts(inputs)
        return merge(parts if past is None else [past, *parts]).out, None
