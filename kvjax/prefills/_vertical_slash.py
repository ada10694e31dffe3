"""Columns and diagonals, chosen by the last queries."""

import dataclasses
from typing import Annotated, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kvjax.attention import self_attention
from kvjax.config import sized
from kvjax.fields import Count, Positive, Range, Size
from kvjax.pallas_kernels.column_stats import column_stats
from kvjax.pallas_kernels.dense import map_query_chunks, query_chunk
from kvjax.pallas_kernels.partial import Partial, merge
from kvjax.pallas_kernels.slots import attend_block, slot_mask
from kvjax.pallas_kernels.sparse_prefill import Diagonals, sparse_prefill
from kvjax.prefills.base import AbstractPrefill
from kvjax.scorers.base import last_queries
from kvjax.types import EMPTY, NEG_INF, LayerInputs, Lengths


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class VerticalSlash(AbstractPrefill):
    """Some columns and some diagonals per head, chosen by the last queries.

    Diagonals are widened to diagonals of blocks, which `sparse_prefill` computes;
    columns outside of them are gathered; both merge by their log-sum-exp. Everything
    else costs nothing.

    Attributes:
        vertical: columns kept per head.
        slash: diagonals kept per head.
        last_q: queries at the end of the prompt that choose.
        first: columns at the start that are always kept.
        local: diagonals next to the main one that are always kept.
        block: queries and keys per block. 1 keeps exactly the chosen diagonals, by a
            mask over dense attention.

    Source: MInference (2407.02490) section 3 and `vertical_and_slash_kernel`
    (1000 / 6096 / 64 / 30 / 100).
    In training the gradient passes through what is computed, by the op's own backward
    pass; the choice has none.
    Deviations: blocks of 128 at multiples of 128, as TPUs want them, where the CUDA
    index has 64 keys from any key on: an isolated diagonal costs up to two blocks.
    Where a scorer wants the mass of every column, dense attention is masked to the
    same pattern.
    """

    vertical: Positive = sized(1000, short=12)
    slash: Positive = sized(6096, short=16)
    last_q: Size = sized(64, short=8)
    first: Count = sized(30, short=2)
    local: Count = sized(100, short=8)
    block: Annotated[int, Range(1, 1024)] = sized(128, short=8)

    def attend(self, inputs, lengths, mass, past=None):
        inputs = _cleared(inputs)
        # The choice is no function to differentiate: its kernels need no gradient.
        columns, diagonals = self.pattern(jax.lax.stop_gradient(inputs), lengths)
        wide = widened(diagonals, self.block)
        if mass or self.block == 1:
            return self._masked(inputs, columns, wide, mass, past)
        parts = [
            self._diagonals(inputs, wide),
            self._columns(inputs, columns, wide),
        ]
        return merge(parts if past is None else [past, *parts]).out, None

    def _masked(self, inputs, columns, wide, mass, past):
        """Dense attention under a mask."""

        def allowed(q_positions: Array, k_positions: Array) -> Array:
            block_of = q_positions // self.block, k_positions // self.block
            offset = block_of[0][:, :, None] - block_of[1][:, None, :]
            near = columns[:, :, None, : k_positions.shape[1]]
            return near | _at(wide, offset[:, None])

        return self_attention(inputs, allowed=allowed, mass=mass, past=past)

    def _diagonals(self, inputs, wide):
        """Attention over the block diagonals."""
        spec = inputs.spec
        capacity = min(wide.shape[-1], 2 * self.slash)
        # What is kept comes first; `sparse_prefill` looks at no other entry.
        offsets = jnp.argsort(~wide, axis=-1, stable=True)[..., :capacity]
        pattern = Diagonals(
            offsets=offsets.astype(jnp.int32),
            counts=jnp.sum(wide, axis=-1, dtype=jnp.int32),
            block=self.block,
        )
        part = sparse_prefill(
            inputs.q,
            inputs.k,
            inputs.v,
            pattern,
            kv_len=jnp.sum(inputs.positions >= 0, axis=-1, dtype=jnp.int32),
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap,
        )
        return Partial(part.out.astype(jnp.float32), part.lse)

    def _columns(self, inputs, columns, wide):
        """Attention over the kept columns, where no block diagonal covers them."""
        spec, (b, h, tokens, _) = inputs.spec, inputs.q.shape
        count = min(columns.shape[-1], self.vertical)
        index = jnp.argsort(~columns, axis=-1, stable=True)[..., :count]
        kept = jnp.take_along_axis(columns, index, axis=-1)
        at = jnp.where(kept, index, EMPTY)  # [B, H, V]
        row = jnp.arange(b)[:, None, None]
        head = (jnp.arange(h) // spec.groups)[:, None]
        k, v = (x[row, head, index] for x in (inputs.k, inputs.v))

        def read(q: Array, q_positions: Array) -> tuple[Partial, tuple[()]]:
            offset = q_positions[:, None, :, None] // self.block
            offset = offset - at[:, :, None, :] // self.block
            mask = slot_mask(q_positions, at, spec.window) & ~_at(wide, offset)
            how = {"scale": spec.scale, "softcap": spec.softcap}
            return attend_block(jnp.moveaxis(q, 2, 1), k, v, mask, **how), ()

        chunk = query_chunk(tokens, b * h * count)
        queries = jnp.moveaxis(inputs.q, 1, 2)
        return map_query_chunks(read, chunk, queries, inputs.positions)[0]

    def pattern(
        self, inputs: LayerInputs, lengths: Lengths
    ) -> tuple[Bool[Array, "B H S"], Bool[Array, "B H S"]]:
        """Kept columns, and kept diagonals by their distance `q - k`."""
        last, spec = last_queries(inputs, self.last_q, None), inputs.spec
        stats = column_stats(
            last.q,
            inputs.k,
            last.positions,
            inputs.positions,
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap,
            slash=True,
        )
        assert stats.slash is not None
        index = jnp.arange(stats.sum.shape[-1])
        live = (index < lengths[:, None])[:, None]
        vertical = jnp.where(index < self.first, jnp.inf, stats.sum)
        slash = jnp.where(index < self.local, jnp.inf, stats.slash)
        return (
            _top(jnp.where(live, vertical, NEG_INF), self.vertical),
            _top(jnp.where(live, slash, NEG_INF), self.slash),
        )


def _cleared(inputs: LayerInputs) -> LayerInputs:
    """`inputs` with zeros in padding: what it holds must not reach a gradient."""
    live = (inputs.positions >= 0)[:, None, :, None]
    q, k, v = (jnp.where(live, x, 0) for x in (inputs.q, inputs.k, inputs.v))
    return dataclasses.replace(inputs, q=q, k=k, v=v)


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


def _at(wide: Bool[Array, "B H N"], offset: Array) -> Bool[Array, "B H T S"]:
    """Whether a block diagonal is kept; `offset` is `[B, 1 or H, T, S]`."""
    inside = (offset >= 0) & (offset < wide.shape[-1])
    offset = jnp.where(inside, offset, 0)
    offset = jnp.broadcast_to(offset, (*wide.shape[:2], *offset.shape[2:]))
    found = jnp.take_along_axis(wide, offset.reshape(*wide.shape[:2], -1), axis=-1)
    return found.reshape(offset.shape) & inside


def _top(scores: Float[Array, "B H S"], count: int) -> Bool[Array, "B H S"]:
    """The `count` highest finite-or-inf scores of each row, ties to the left."""
    s = scores.shape[-1]
    if count >= s:
        return scores > NEG_INF
    order = jnp.argsort(-scores, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    return (rank < count) & (scores > NEG_INF)
