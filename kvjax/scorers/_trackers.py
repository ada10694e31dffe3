"""Decode-time forms of scores: what is remembered, and how it is brought up to date."""

import dataclasses
from typing import final

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache import Slots, Tail
from kvjax.cache.tracking import put_slot
from kvjax.codecs import PlainArray
from kvjax.pallas_kernels.partial import merge
from kvjax.pallas_kernels.slots import slot_mask, slot_mass
from kvjax.scorers.base import (
    AbstractScoreTracker,
    average_pool,
    group_mean,
    last_queries,
)
from kvjax.types import LayerSpec, pytree


def negative_norm(keys: Array) -> Array:
    """`-||k||` in float32."""
    wide = keys.astype(jnp.float32)
    return -jnp.sqrt(jnp.sum(wide * wide, axis=-1))


def _masses(
    q: Array, q_positions: Array, lse: Array, body: Slots, tail: Tail, spec: LayerSpec
) -> tuple[Array, Array]:
    """Softmax weights of body and tail slots over their union, per query head."""
    assert isinstance(body.keys, PlainArray)

    def weights(keys: Array, positions: Array) -> Array:
        mask = slot_mask(q_positions, positions, spec.window)
        return slot_mass(q, lse, keys, mask, scale=spec.scale, softcap=spec.softcap)

    return weights(body.keys.data, body.positions), weights(tail.keys, tail.positions)


def _newest(body: Slots, tail: Tail) -> Int[Array, "B"]:
    """Position of the newest token held, per row."""
    newest = jnp.maximum(
        body.positions.max(axis=(1, 2)), tail.positions.max(axis=(1, 2))
    )
    return newest


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class ContentTracker(AbstractScoreTracker):
    """Scores that are a function of the slot alone; nothing is remembered.

    Attributes:
        score: `recency` or `knorm`.
        n_sink: first tokens that are always kept.
    """

    score: str
    n_sink: int

    def start(self, observed, index, tail):
        del observed, index, tail
        return ()

    def update(self, state, q, q_positions, lse, body, tail, spec):
        del q, q_positions, lse, body, tail, spec
        return state

    def scores(self, state, body, tail, spec):
        del state, spec
        assert isinstance(body.keys, PlainArray)
        return (
            self._of(body.keys.data, body.positions),
            self._of(tail.keys, tail.positions),
        )

    def _of(self, keys: Array, positions: Array) -> Array:
        if self.score == "knorm":
            scores = negative_norm(keys)
        else:
            scores = positions.astype(jnp.float32)
        return jnp.where(positions < self.n_sink, jnp.inf, scores)


@pytree
class _MassState:
    body: Float[Array, "B K S"]
    tail: Float[Array, "B K R"]


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class MassTracker(AbstractScoreTracker):
    """H2O: attention mass per slot, accumulated over prompt and generation.

    Attributes:
        recent: newest tokens that are always kept.

    Source: H2O (2306.14048) section 4, algorithm 1.
    Deviations: the mass of a GQA group is averaged over its query heads.
    """

    recent: int

    def observe(self, inputs, lengths, observed):
        del inputs, lengths
        return observed

    def start(self, observed, index, tail):
        b, k, _ = index.shape
        mass = jnp.take_along_axis(observed, index, axis=-1)
        return _MassState(body=mass, tail=jnp.zeros((b, k, tail), jnp.float32))

    def update(self, state, q, q_positions, lse, body, tail, spec):
        masses = _masses(q, q_positions, lse, body, tail, spec)
        in_body, in_tail = (
            group_mean(jnp.sum(m, axis=2), spec.num_kv_heads) for m in masses
        )
        return _MassState(body=state.body + in_body, tail=state.tail + in_tail)

    def scores(self, state, body, tail, spec):
        del spec
        edge = (_newest(body, tail) - self.recent)[:, None, None]
        return (
            jnp.where(body.positions > edge, jnp.inf, state.body),
            jnp.where(tail.positions > edge, jnp.inf, state.tail),
        )

    def moved(self, state, slot, j, on):
        mass = jnp.take(state.tail, j, axis=-1)
        return dataclasses.replace(state, body=put_slot(state.body, mass, slot, on))

    def cleared(self, state, rows):
        tail = jnp.where(rows[:, None, None], 0.0, state.tail)
        return dataclasses.replace(state, tail=tail)


@pytree
class _WindowState:
    queries: Float[Array, "B H W D"]
    positions: Int[Array, "B W"]


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowTracker(AbstractScoreTracker):
    """SnapKV and TOVA while decoding: the last queries are kept and vote.

    Attributes:
        window: queries remembered; the newest `window` tokens are always kept.
        kernel: average pooling along the token order of the held slots.
        share_heads: average over all heads (TOVA) instead of the group (SnapKV).

    Source: kvpress `DecodingPress` over `SnapKVPress`.
    Deviations: queries keep the positions they were asked at (kvpress rotates all
    of them to the current one), and pooling runs over the tokens that are left.
    """

    window: int
    kernel: int
    share_heads: bool

    def observe(self, inputs, lengths, observed):
        del observed
        queries, positions = last_queries(inputs, lengths, self.window)
        return _WindowState(queries=queries, positions=positions)

    def start(self, observed, index, tail):
        del index, tail
        return observed

    def update(self, state, q, q_positions, lse, body, tail, spec):
        del lse, body, tail, spec
        # The last ones of what was there and what has come, row by row.
        fresh = jnp.sum(q_positions >= 0, axis=1)
        index = fresh[:, None] + jnp.arange(self.window)
        queries = jnp.concatenate([state.queries, q], axis=2)
        positions = jnp.concatenate([state.positions, q_positions], axis=1)
        return _WindowState(
            queries=jnp.take_along_axis(queries, index[:, None, :, None], axis=2),
            positions=jnp.take_along_axis(positions, index, axis=1),
        )

    def scores(self, state, body, tail, spec):
        asked = (state.queries, state.positions)
        lse = merge([part.attend(*asked, spec) for part in (body, tail)]).lse
        masses = _masses(*asked, lse, body, tail, spec)
        kv_heads = body.positions.shape[1]
        mass = jnp.concatenate([jnp.mean(m, axis=2) for m in masses], axis=-1)
        positions = jnp.concatenate([body.positions, tail.positions], axis=-1)
        if self.share_heads:
            shared = jnp.mean(mass, axis=1, keepdims=True)
            mass = jnp.broadcast_to(shared, positions.shape)
        else:
            mass = group_mean(mass, kv_heads)
        edge = (_newest(body, tail) - self.window)[:, None, None]
        recent = positions > edge
        mass = _pool_in_order(jnp.where(recent, 0.0, mass), positions, self.kernel)
        scores = jnp.where(recent, jnp.inf, mass)
        split = body.positions.shape[-1]
        return scores[..., :split], scores[..., split:]


def _pool_in_order(mass: Array, positions: Array, kernel: int) -> Array:
    """Average pooling in position order; slots are in any order."""
    if kernel == 1:
        return mass
    order = jnp.argsort(jnp.where(positions >= 0, positions, jnp.iinfo(jnp.int32).max))
    pooled = average_pool(jnp.take_along_axis(mass, order, axis=-1), kernel)
    back = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(pooled, back, axis=-1)
