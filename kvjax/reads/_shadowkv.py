"""Chunks by the mean of their keys, unlike ones exactly (ShadowKV)."""

import dataclasses
from typing import ClassVar, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache import Landmarks, Slots
from kvjax.codecs import PlainArray
from kvjax.config import sized
from kvjax.fields import Count, Fraction, Size
from kvjax.pallas_kernels.page_summary import page_summary
from kvjax.reads.base import AbstractBudgeted
from kvjax.types import EMPTY


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class ShadowKV(AbstractBudgeted):
    """The chunks whose landmark a query looks at; those that have none, exactly.

    A chunk's landmark is the mean of its keys. The chunks whose keys are least like it
    (by the smallest cosine in the chunk) and the last ones of the prompt are held in a
    part of their own, as they were before any codec, and always read, beside the
    budget. Of the others a query reads those with the largest softmax share of
    `q . landmark`, the largest in the group; keys that `store.keys` holds in low rank
    are rebuilt for these alone. Tokens behind the prompt stay plain, and all are read.

    Attributes:
        size: tokens of a chunk.
        outliers: chunks per KV head that are held exactly.
        local: last whole chunks of the prompt, held exactly with what is behind them.

    Source: ShadowKV (2410.21465) and its repository at a21f5a9 (chunks of 8, 48
    outliers and 2048 tokens of 128K, 4 local chunks).
    Deviations: the rank of keys is a matter of `store.keys`; landmarks and outliers are
    of exact keys; logits have the layer's scale. `store.place` says where keys and
    values lie, there the values in the host's memory.
    """

    keep: Fraction | None = 0.0156
    size: Size = sized(8, short=8)
    outliers: Count = sized(48, short=2)
    local: Count = sized(4, short=1)

    exact: ClassVar[bool] = True

    @property
    def page(self):
        return self.size

    def index(self, part, exact, seen, spec):
        del seen
        slots, live = part.positions.shape[-1], part.positions >= 0
        chunks = slots // self.size
        filled = jnp.max(jnp.sum(live, axis=-1, dtype=jnp.int32), axis=-1)
        keys, values = (
            side.decode(exact.positions, spec.rope)
            for side in (exact.keys, exact.values)
        )
        landmark = page_summary(keys, live, page=self.size).mean
        like = likeness(keys, landmark, live)
        chosen, there = self.held_exactly(like, filled)
        near = _chunks_of(keys, values, part.positions, chosen, there, self.size)
        row = jnp.arange(len(filled))[:, None, None]
        head = jnp.arange(live.shape[1])[:, None]
        gone = jnp.where(there, chosen, chunks)  # dropped
        apart = jnp.zeros((*live.shape[:2], chunks), jnp.bool_)
        apart = apart.at[row, head, gone].set(True, mode="drop")
        apart = jnp.repeat(apart, self.size, axis=-1)
        far = Landmarks(
            keys=part.keys,
            values=part.values,
            positions=jnp.where(apart, EMPTY, part.positions),
            filled=filled,
            page=self.size,
            landmark=landmark,
            budget=self.budget,
            group="softmax_max",
        )
        return far, near

    def held_exactly(
        self, like: Float[Array, "B K P"], filled: Int[Array, "B"]
    ) -> tuple[Int[Array, "B K X"], Bool[Array, "B K X"]]:
        """Chunks that are, of every head, and which of these there are."""
        b, kv_heads, chunks = like.shape
        edge = (filled // self.size)[:, None, None] - self.local  # the first local one
        local = edge + jnp.arange(self.local + 1)
        there = (local >= 0) & (local * self.size < filled[:, None, None])
        far = jnp.where(jnp.arange(chunks) < edge, -like, -jnp.inf)
        far = jax.lax.stop_gradient(far)
        best, outlier = jax.lax.top_k(far, min(self.outliers, chunks))
        lead = (b, kv_heads, self.local + 1)
        local = jnp.clip(jnp.broadcast_to(local, lead), 0, chunks - 1)
        there = jnp.broadcast_to(there, lead)
        chosen = jnp.concatenate([outlier, local], axis=-1)
        return chosen, jnp.concatenate([best > -jnp.inf, there], axis=-1)


def likeness(
    keys: Float[Array, "B K S D"],
    landmark: Float[Array, "B K P D"],
    live: Bool[Array, "B K S"],
) -> Float[Array, "B K P"]:
    """The smallest cosine of a chunk's keys with its landmark; `inf` of no keys."""
    b, kv_heads, pages, d = landmark.shape
    keys = jnp.where(live[..., None], keys, 0).astype(jnp.float32)
    keys = keys.reshape(b, kv_heads, pages, -1, d)
    mark = landmark.astype(jnp.float32)[:, :, :, None]
    norms = jnp.linalg.norm(keys, axis=-1) * jnp.linalg.norm(mark, axis=-1)
    cosine = jnp.sum(keys * mark, axis=-1) / jnp.where(norms > 0, norms, 1.0)
    live = live.reshape(cosine.shape)
    return jnp.min(jnp.where(live, cosine, jnp.inf), axis=-1)


def _chunks_of(
    keys: Float[Array, "B K S D"],
    values: Float[Array, "B K S D"],
    positions: Int[Array, "B K S"],
    chosen: Int[Array, "B K X"],
    there: Bool[Array, "B K X"],
    size: int,
) -> Slots:
    """Some chunks of `size` tokens of every head as slots of their own."""
    lead = chosen.shape[:2]
    slot = (chosen[..., None] * size + jnp.arange(size)).reshape(*lead, -1)
    live = jnp.repeat(there, size, axis=-1)
    positions = jnp.take_along_axis(positions, slot, axis=-1)
    keys, values = (
        jnp.take_along_axis(x, slot[..., None], axis=2) for x in (keys, values)
    )
    return Slots(
        keys=PlainArray(data=keys),
        values=PlainArray(data=values),
        positions=jnp.where(live, positions, EMPTY),
    )
