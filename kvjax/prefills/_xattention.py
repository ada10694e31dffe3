"""The blocks that hold most of the mass, estimated along antidiagonals."""

import dataclasses
from typing import Annotated, final

import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.config import sized
from kvjax.fields import Fraction, Range
from kvjax.pallas_kernels.block_score import block_score
from kvjax.prefills.chosen import Chosen, visible_blocks
from kvjax.prefills.pattern import AbstractPattern
from kvjax.prefills.ranking import fewest
from kvjax.types import LayerInputs, Lengths


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class XAttention(AbstractPattern):
    """Each block of queries sees the fewest blocks that hold a share of its mass.

    The first block and its own are always among those.

    Attributes:
        threshold: share of the estimated mass.
        stride: tokens per antidiagonal; divides `block`.

    Source: XAttention (2503.16428), `xattn_estimate` and `find_blocks_chunked` (0.9,
    stride 16, blocks of 128).
    Deviations: one threshold for all heads; of blocks with equal mass all are kept or
    none; mass outside of a sliding window is left out of the sum after the softmax; no
    softcap in the estimate.

    Cost: `1 / stride` of dense attention's score product, and `(S / block) ** 2`
    numbers per head.
    """

    threshold: Fraction = 0.9
    stride: Annotated[int, Range(1, 1024)] = sized(16, short=4)

    def __post_init__(self):
        super().__post_init__()
        if self.block % self.stride:
            raise ValueError(
                f"`stride` must divide `block`={self.block}; got {self.stride}."
            )

    def choose(self, inputs: LayerInputs, lengths: Lengths) -> Chosen:
        """See `AbstractPattern`."""
        mass = self.mass(inputs, lengths)
        n = mass.shape[-1]
        seen = visible_blocks(lengths, n, self.block, inputs.spec.window)
        mass = jnp.where(seen, mass, 0)
        always = jnp.eye(n, dtype=bool) | (jnp.arange(n) == 0)
        total = jnp.sum(mass, axis=-1, keepdims=True)
        there = jnp.sum(jnp.where(always, mass, 0), axis=-1, keepdims=True)
        others = fewest(jnp.where(always, 0, mass), self.threshold * total - there)
        return Chosen(blocks=(others | always) & seen, block=self.block)

    def mass(self, inputs: LayerInputs, lengths: Lengths) -> Float[Array, "B H N N"]:
        """Estimated mass that blocks of queries pay to blocks of keys."""
        block, per = self.block, self.block // self.stride
        tokens = inputs.positions.shape[1]
        pad = [(0, 0), (0, 0), (0, -tokens % block), (0, 0)]
        found = block_score(
            jnp.pad(inputs.q, pad),
            jnp.pad(inputs.k, pad),
            block_q=block,
            block_k=block,
            stride=self.stride,
            scale=inputs.spec.scale,
        )
        # Groups of padding alone, all zeros, pay the same to every group they see. Only
        # the block with which a row ends holds them beside others.
        n, last = found.shape[-1], (lengths // block)[:, None]
        group = last * per + jnp.arange(per)
        dead = group * self.stride >= lengths[:, None]
        known = group[:, None] + 1 - jnp.arange(n)[:, None] * per
        share = jnp.clip(known, 0, per).astype(jnp.float32)
        share = share / (group + 1).astype(jnp.float32)[:, None]
        extra = jnp.sum(jnp.where(dead[:, None], share, 0), axis=-1)  # [B, N]
        ends = (jnp.arange(n) == last)[:, None, :, None]
        return jnp.maximum(found - jnp.where(ends, extra[:, None, None], 0), 0)
