"""D2O: dropped tokens go into the kept ones most like them (2406.13035)."""

import dataclasses
from typing import final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache import AbstractMerge
from kvjax.pallas_kernels.dense import query_chunk
from kvjax.pallas_kernels.partial import feature_sum

CHUNK = 128
"""Dropped tokens that are compared with the others at a time, at most."""

MARGIN = 1e-6
"""Rounding of a mean of cosines: tokens that are all alike are at their mean."""


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class D2O(AbstractMerge):
    """Each dropped token that is like a kept one is mixed into it, key and value.

    A dropped token `i` goes to the kept token `j` whose key has the largest cosine
    `c_i` with its own, as they are held (after RoPE), if `c_i` is at least the mean of
    these over the head's dropped tokens. Others are lost.

        k_j <- (e k_j + sum_i exp(c_i) R(p_j - p_i) k_i) / (e + sum_i exp(c_i))
        v_j <- (e v_j + sum_i exp(c_i) v_i) / (e + sum_i exp(c_i))

    `R` turns a key by RoPE from its own position to the receiver's.

    Cost: `O(dropped x S)` products of keys per KV head and eviction, in pieces whose
    logits stay inside `LOGITS_BUDGET`; temporaries linear in `S D`. No state.

    Source: D2O (2406.13035) section 3.3.
    Deviations: the merging alone; the layer budgets of the paper are not part of it.
    The threshold is the rule of the prompt at every eviction: the paper's moving
    average over decoding steps would be a state. Each KV head has its own (the
    repository: one for all heads). Keys are turned before they are mixed, and weights
    sum to one (the repository: neither).
    """

    def merged(self, held, kept, scores):
        del scores
        dropped = held.live & ~kept & jnp.any(kept, axis=-1, keepdims=True)
        to = _nearest(jax.lax.stop_gradient(held.k), held.positions, kept, dropped)
        cosine = _cosine(held.k, _take(held.k, to))
        goes = dropped & (cosine >= _threshold(cosine, dropped))
        weight = jnp.where(goes, jnp.exp(cosine), 0.0)

        rope, at = held.spec.rope, jnp.take_along_axis(held.positions, to, axis=-1)
        keys = held.k.astype(jnp.float32)
        keys = rope.rotate(rope.unrotate(keys, held.positions), at)
        total = jnp.e + _added(weight, to, goes)
        got = _added(jnp.ones_like(weight), to, goes) > 0

        def mixed(old: Array, given: Array) -> Array:
            given = weight[..., None] * given.astype(jnp.float32)
            new = jnp.e * old.astype(jnp.float32) + _added(given, to, goes)
            new = (new / total[..., None]).astype(old.dtype)
            return jnp.where(got[..., None], new, old)

        return mixed(held.k, keys), mixed(held.v, held.v)


def _nearest(
    k: Array, positions: Array, kept: Array, dropped: Bool[Array, "B K S"]
) -> Int[Array, "B K S"]:
    """Slot of the kept key most like each dropped one; ties: the lower position."""
    b, heads, s, _ = k.shape
    size = min(CHUNK, query_chunk(s, b * heads * s))
    most, inverse = jnp.iinfo(jnp.int32).max, 1 / _norms(k)
    order = jnp.argsort(~dropped, axis=-1, stable=True)
    order = jnp.pad(order, [(0, 0), (0, 0), (0, -s % size)])
    row, head = jnp.arange(b)[:, None, None], jnp.arange(heads)[:, None]

    def some(i: Array, found: Array) -> Array:
        slots = jax.lax.dynamic_slice_in_dim(order, i * size, size, axis=2)
        like = jnp.einsum(
            "BKTD,BKSD->BKTS", _take(k, slots), k, preferred_element_type=jnp.float32
        )
        like = jnp.where(kept[:, :, None], like * inverse[:, :, None], -jnp.inf)
        best = like == jnp.max(like, axis=-1, keepdims=True)
        first = jnp.where(best, positions[:, :, None], most)
        return found.at[row, head, slots].set(jnp.argmin(first, axis=-1))

    pieces = -(-jnp.max(jnp.sum(dropped, axis=-1)) // size)
    return jax.lax.fori_loop(0, pieces, some, jnp.zeros(dropped.shape, jnp.int32))


def _threshold(cosine: Array, dropped: Array) -> Float[Array, "B K 1"]:
    """Mean over the dropped tokens of each head."""
    number = jnp.maximum(jnp.sum(dropped, axis=-1, keepdims=True), 1)
    total = jnp.sum(jnp.where(dropped, cosine, 0.0), axis=-1, keepdims=True)
    return total / number.astype(jnp.float32) - MARGIN


def _norms(x: Array) -> Float[Array, "B K S"]:
    """Lengths; 1 of zeros, whose gradient is 0."""
    square = feature_sum(x.astype(jnp.float32) ** 2)
    return jnp.sqrt(jnp.where(square > 0, square, 1.0))


def _cosine(x: Array, y: Array) -> Float[Array, "B K S"]:
    wide = x.astype(jnp.float32) * y.astype(jnp.float32)
    return feature_sum(wide) / (_norms(x) * _norms(y))


def _take(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, index[..., None], axis=2)


def _added(x: Array, to: Array, on: Array) -> Array:
    """What tokens have, `[B, K, S, ...]`, added up at the slots they go to."""
    b, heads, s = to.shape
    row, head = jnp.arange(b)[:, None, None], jnp.arange(heads)[:, None]
    return jnp.zeros_like(x).at[row, head, jnp.where(on, to, s)].add(x, mode="drop")
