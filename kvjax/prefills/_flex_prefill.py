"""Columns and diagonals of blocks, or the best blocks, as a head's queries need."""

import dataclasses
from typing import final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.config import sized
from kvjax.fields import Fraction, Positive, Share
from kvjax.prefills.chosen import Chosen, visible_blocks
from kvjax.prefills.pattern import AbstractPattern
from kvjax.prefills.ranking import (
    block_means,
    fewest,
    highest,
    line_mass,
    mean_logits,
)
from kvjax.scorers.base import last_queries
from kvjax.types import NEG_INF, LayerInputs, Lengths


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class FlexPrefill(AbstractPattern):
    """Columns and diagonals of blocks by cumulative mass; more where means are true.

    The last `block` queries say how many columns and how many diagonals hold `gamma` of
    their mass; as many blocks of columns, and diagonals of blocks, are kept. Where the
    mean query and the mean keys tell how that mass lies over the blocks, the head keeps
    the fewest columns and diagonals, and the blocks of the whole map of means that hold
    `gamma` of it.

    Attributes:
        gamma: share of the mass.
        tau: distance (root of the Jensen-Shannon divergence, natural logarithm) below
            which means are taken for true; 0: never.
        least: tokens of columns, and of diagonals, that are kept at least.
        most: tokens of each that are kept at most; None: no limit.

    Source: FlexPrefill (2502.20766) and `get_active_blocks` (0.9 / 0.1 / 1024 / none,
    blocks of 128).
    Deviations: a column or diagonal count becomes one of blocks by `block`, where the
    source divides by 128; diagonals are pooled from the main one on, where the source
    pools from the far end; the block with which the sum passes `gamma` counts too, in
    the map as well, and of equal ones all or none. No softcap in the map of means.

    Cost: `block` queries over all keys, and `(S / block) ** 2` numbers per head.
    """

    gamma: Fraction = 0.9
    tau: Share = 0.1
    least: Positive = sized(1024, short=8)
    most: Positive | None = None

    def choose(self, inputs: LayerInputs, lengths: Lengths) -> Chosen:
        """See `AbstractPattern`."""
        b, tokens = inputs.positions.shape
        n = -(-tokens // self.block)
        columns, diagonals = self.lines(inputs, lengths)
        known = self.distance(inputs, lengths, columns) < self.tau  # [B, H]
        kept = [self._kept(x, lengths, known) for x in (columns, diagonals)]
        lines = Chosen(diagonals=kept[1], block=self.block).map(b, n)
        lines = lines | kept[0][:, :, None]
        blocks = lines | (known[..., None, None] & self.means(inputs, lengths))
        return Chosen(blocks=blocks, block=self.block)

    def lines(
        self, inputs: LayerInputs, lengths: Lengths
    ) -> tuple[Float[Array, "B H S"], Float[Array, "B H S"]]:
        """Mass of each column and of each diagonal, over the last queries; each 1."""
        columns, diagonals = line_mass(inputs, self.block)
        count = self._asking(lengths)
        return columns / count, diagonals / count

    def distance(
        self, inputs: LayerInputs, lengths: Lengths, columns: Float[Array, "B H S"]
    ) -> Float[Array, "B H"]:
        """How far the mass of blocks is from what means say of it."""
        last = last_queries(inputs, self.block, None)
        count = self._asking(lengths)
        live = (last.positions >= 0)[:, None, :, None]
        q = jnp.sum(jnp.where(live, last.q, 0), axis=2, dtype=jnp.float32) / count
        k = block_means(inputs.k, lengths, self.block)
        b, h, d = q.shape
        logits = jnp.einsum("BKGD,BKND->BKGN", q.reshape(b, k.shape[1], -1, d), k)
        logits = logits.reshape(b, h, -1) * inputs.spec.scale
        there = self._live(lengths, logits.shape[-1])
        logits = jnp.where(there, logits, NEG_INF)
        # A row without a token has no softmax: nothing looks at what comes of it.
        guess = jnp.where(there, jax.nn.softmax(jnp.where(there, logits, -1e30)), 0)
        true = self._pooled(columns)
        middle = (guess + true) / 2

        def against(p: Array) -> Array:
            ratio = jnp.where(p > 0, p / jnp.where(p > 0, middle, 1), 1)
            return jnp.sum(p * jnp.log(ratio), axis=-1)

        return jnp.sqrt(jnp.maximum((against(guess) + against(true)) / 2, 0))

    def means(self, inputs: LayerInputs, lengths: Lengths) -> Bool[Array, "B H N N"]:
        """Blocks that hold `gamma` of the whole map of means."""
        logits = mean_logits(inputs, lengths, self.block)
        b, h, n, _ = logits.shape
        seen = visible_blocks(lengths, n, self.block, inputs.spec.window)
        weight = jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1)
        flat = jnp.where(seen, weight, 0).reshape(b, h, n * n)
        wanted = self.gamma * jnp.sum(flat, axis=-1, keepdims=True)
        return fewest(flat, wanted).reshape(b, h, n, n)

    def _kept(
        self, mass: Float[Array, "B H S"], lengths: Lengths, known: Bool[Array, "B H"]
    ) -> Bool[Array, "B H N"]:
        """Blocks of columns, or diagonals of blocks; the first one always."""
        share = jnp.full((*mass.shape[:2], 1), self.gamma)
        held = jnp.sum(fewest(mass, share), axis=-1, dtype=jnp.int32)
        count = self._blocks(held)
        blocks = self._pooled(mass)
        blocks = blocks.at[..., 0].set(jnp.inf)
        there = self._live(lengths, blocks.shape[-1])
        count = jnp.where(known, -(-self.least // self.block), count)[..., None]
        return highest(jnp.where(there, blocks, NEG_INF), count)

    def _blocks(self, held: Int[Array, "B H"]) -> Int[Array, "B H"]:
        """Blocks for so many columns or diagonals."""
        least = -(-self.least // self.block)
        count = jnp.maximum(held // self.block + 1, least)
        if self.most is None:
            return count
        return jnp.minimum(count, -(-self.most // self.block))

    def _asking(self, lengths: Lengths) -> Float[Array, "B 1 1"]:
        """Queries that say what is kept."""
        return jnp.clip(lengths, 1, self.block).astype(jnp.float32)[:, None, None]

    def _live(self, lengths: Lengths, n: int) -> Bool[Array, "B 1 N"]:
        """Blocks that hold a token."""
        return (jnp.arange(n) * self.block < lengths[:, None])[:, None]

    def _pooled(self, x: Float[Array, "B H S"]) -> Float[Array, "B H N"]:
        """Sums of blocks."""
        pad = -x.shape[-1] % self.block
        x = jnp.pad(x, [(0, 0), (0, 0), (0, pad)])
        return jnp.sum(x.reshape(*x.shape[:2], -1, self.block), axis=-1)
