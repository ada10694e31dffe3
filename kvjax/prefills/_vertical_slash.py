"""Columns and diagonals, chosen by the last queries."""

import dataclasses
from typing import final

import jax.numpy as jnp
from jaxtyping import Array, Bool

from kvjax.config import sized
from kvjax.fields import Count, Positive, Size
from kvjax.prefills.chosen import Chosen
from kvjax.prefills.pattern import AbstractPattern
from kvjax.prefills.ranking import highest, line_mass
from kvjax.types import NEG_INF, LayerInputs, Lengths


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class VerticalSlash(AbstractPattern):
    """Some columns and some diagonals per head, chosen by the last queries.

    Diagonals are widened to diagonals of blocks, which `sparse_prefill` computes;
    columns outside of them are gathered; both merge by their log-sum-exp.

    Attributes:
        vertical: columns kept per head.
        slash: diagonals kept per head.
        last_q: queries at the end of the prompt that choose.
        first: columns at the start that are always kept.
        local: diagonals next to the main one that are always kept.

    Source: MInference (2407.02490) section 3 and `vertical_and_slash_kernel`
    (1000 / 6096 / 64 / 30 / 100).
    Deviations: blocks of 128 at multiples of 128, as TPUs want them, where the CUDA
    index has 64 keys from any key on: an isolated diagonal costs up to two blocks.
    """

    vertical: Positive = sized(1000, short=12)
    slash: Positive = sized(6096, short=16)
    last_q: Size = sized(64, short=8)
    first: Count = sized(30, short=2)
    local: Count = sized(100, short=8)
    dense_below: Count = sized(16384, short=0)  # of its sizes: docs/sparse_prefill.md

    def choose(self, inputs: LayerInputs, lengths: Lengths) -> Chosen:
        """See `AbstractPattern`."""
        columns, diagonals = self.pattern(inputs, lengths)
        return Chosen(
            diagonals=widened(diagonals, self.block),
            columns=columns,
            block=self.block,
            most=2 * self.slash,
            most_columns=self.vertical,
        )

    def pattern(
        self, inputs: LayerInputs, lengths: Lengths
    ) -> tuple[Bool[Array, "B H S"], Bool[Array, "B H S"]]:
        """Kept columns, and kept diagonals by their distance `q - k`."""
        columns, diagonals = line_mass(inputs, self.last_q)
        index = jnp.arange(columns.shape[-1])
        live = (index < lengths[:, None])[:, None]
        vertical = jnp.where(index < self.first, jnp.inf, columns)
        slash = jnp.where(index < self.local, jnp.inf, diagonals)
        return (
            highest(jnp.where(live, vertical, NEG_INF), self.vertical),
            highest(jnp.where(live, slash, NEG_INF), self.slash),
        )


def widened(diagonals: Bool[Array, "B H S"], block: int) -> Bool[Array, "B H X"]:
    """Diagonals of blocks, by `query block - key block`, that hold a kept diagonal.

    Distance `s` lies in the block diagonals `s // block` and, unless it is a multiple
    of `block`, in the next one.
    """
    b, h, s = diagonals.shape
    blocks = -(-s // block)
    padded = jnp.pad(diagonals, [(0, 0), (0, 0), (0, blocks * block - s)])
    held = padded.reshape(b, h, blocks, block)
    above = jnp.any(held[..., 1:], axis=-1)
    above = jnp.pad(above, [(0, 0), (0, 0), (1, 0)])[..., :blocks]
    return jnp.any(held, axis=-1) | above
