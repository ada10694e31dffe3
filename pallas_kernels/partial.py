"""Partial softmax attention and its exact merge, the currency of every attention op."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kvjax.types import NEG_INF

PIECE = 64
"""Numbers that `row_sum` adds up at a time."""


class Partial(NamedTuple):
    """Attention over a part of the keys.

    Attributes:
        out: `[..., T, D]` f32, normalised over this part; 0 where nothing is visible.
        lse: `[..., T]` f32, log-sum-exp of this part's logits; -inf where nothing is.
    """

    out: Float[Array, "*lead T D"]
    lse: Float[Array, "*lead T"]


def nothing_seen(q: Float[Array, "*lead T D"]) -> Partial:
    """Attention of `q` over no keys at all."""
    return Partial(
        jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], NEG_INF, jnp.float32)
    )


def merge(parts: list[Partial]) -> Partial:
    """Exact attention over the union of disjoint parts.

    Order does not matter; parts in which a query sees nothing weigh exactly zero.
    """
    if len(parts) == 1:
        return parts[0]
    lse = jnp.stack([part.lse for part in parts])
    peak = jax.lax.stop_gradient(jnp.max(lse, axis=0))
    anchor = jnp.where(jnp.isneginf(peak), 0.0, peak)  # -inf - -inf is NaN
    weight = jnp.exp(lse - anchor)
    total = jnp.sum(weight, axis=0)
    safe = jnp.where(total > 0, total, 1.0)
    out = sum(w[..., None] * p.out for w, p in zip(weight, parts, strict=True))
    merged = jnp.where(total > 0, anchor + jnp.log(safe), NEG_INF)
    return Partial(jnp.asarray(out) / safe[..., None], merged)


def softmax_partial(
    logits: Float[Array, "*lead T S"],
    mask: Bool[Array, "*lead_m T_m S"],
    values: Float[Array, "*lead_v S D"],
    in_pieces: bool = False,
) -> Partial:
    """Softmax over `S` where `mask`, times `values`; rows that see nothing give 0.

    `values` must be finite (0 times NaN is NaN): callers clear masked slots first.
    """
    return softmax_weights(logits, mask, values, in_pieces)[0]


def softmax_weights(
    logits: Float[Array, "*lead T S"],
    mask: Bool[Array, "*lead_m T_m S"],
    values: Float[Array, "*lead_v S D"],
    in_pieces: bool = True,
) -> tuple[Partial, Array, Array]:
    """`softmax_partial` with its weights: `softmax = weight * share[..., None]`.

    Weights are summed as by `row_sum`, if `in_pieces`.
    """
    logits = jnp.where(mask, logits.astype(jnp.float32), NEG_INF)
    # The peak only keeps exp in range; without a gradient nothing is lost.
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    anchor = jnp.where(jnp.isneginf(peak), 0.0, peak)
    weight = jnp.exp(logits - anchor)
    total = row_sum(weight) if in_pieces else jnp.sum(weight, axis=-1)
    safe = jnp.where(total > 0, total, 1.0)
    out = jnp.matmul(
        weight.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
    lse = jnp.where(total > 0, anchor[..., 0] + jnp.log(safe), NEG_INF)
    share = jnp.where(total > 0, 1.0 / safe, 0.0)
    return Partial(out * share[..., None], lse), weight, share


def row_sum(x: Float[Array, "*lead S"]) -> Float[Array, "*lead"]:
    """Sum over the last axis that zeros behind it do not change in any bit.

    XLA on a CPU chooses the order of a sum by its length and by what it is fused with:
    a row would not be what it is in a wider batch. Pairs of pieces leave no choice.
    Holds for multiples of `PIECE`, as widths of prompts are; the number of operations
    grows with the logarithm of their number.
    """
    if x.shape[-1] % PIECE:
        return jnp.sum(x, axis=-1)
    return _in_pairs(jnp.sum(x.reshape(*x.shape[:-1], -1, PIECE), axis=-1))


def feature_sum(x: Float[Array, "*lead D"]) -> Float[Array, "*lead"]:
    """Sum over the last axis that is the same in any batch, bit by bit.

    XLA on a CPU sums a short axis in an order that depends on how many sums there are.
    """
    return _in_pairs(x) if x.shape[-1] < PIECE else jnp.sum(x, axis=-1)


def _in_pairs(x: Array) -> Array:
    while (count := x.shape[-1]) > 1:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count % 2)])
        x = x[..., ::2] + x[..., 1::2]
    return x[..., 0]


def cap(logits: Array, softcap: float | None) -> Array:
    """`softcap * tanh(logits / softcap)`, or the logits."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)
