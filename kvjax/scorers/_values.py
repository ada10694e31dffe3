"""Scores that look at values too: CriticalKV and CUR."""

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.cache import places
from kvjax.config import sized
from kvjax.fields import Amount, Count, Share, Size
from kvjax.pallas_kernels.dense import LOGITS_BUDGET
from kvjax.pallas_kernels.partial import feature_sum
from kvjax.scorers.base import AbstractScorer, by_position, protect_first, unsorted
from kvjax.types import LayerInputs, Scores, pytree


@pytree
class _CriticalTokens:
    base: Any
    norm: Float[Array, "B K S"]


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticalKV(AbstractScorer):
    """Another score, weighted by what the value adds to the layer's output.

    The first `first_stage` of the budget goes to the highest base scores; the rest
    is ranked by `(base + epsilon) * ||W_O v||_1`.

    Attributes:
        base: the score that is wrapped.
        epsilon: added to the base score in the second stage.
        first_stage: fraction of the budget that the base score decides alone.

    Source: CriticalKV (2502.03805) algorithm 1; kvpress `CriticalKVPress`.
    Deviations: tokens that the base protects stay protected in both stages.
    """

    base: AbstractScorer
    epsilon: Amount = 1e-4
    first_stage: Share = 0.5

    def __post_init__(self):
        super().__post_init__()
        if self.base.probes:
            raise ValueError(
                f"`base` must score a prompt that is read once; got "
                f"{type(self.base).__name__}, which reads it again. Use another score."
            )

    @property
    def needs_mass(self):  # type: ignore[override]
        return self.base.needs_mass

    @property
    def needs_retention(self):  # type: ignore[override]
        return self.base.needs_retention

    @property
    def protected(self):
        return self.base.protected

    def tokens(self, asked):
        return _CriticalTokens(base=self.base.tokens(asked), norm=projected_norm(asked))

    def row(self, asked, before):
        return self.base.row(asked, before)

    def received(self, slots, mass):
        return dataclasses.replace(slots, base=self.base.received(slots.base, mass))

    def score(self, memory, held, counts):
        own = dataclasses.replace(memory, slots=memory.slots.base)
        base = jnp.where(held.live, self.base.score(own, held, counts), -jnp.inf)
        ranked = jnp.where(held.live, self.base.ranked(own, held, counts), -jnp.inf)
        rank = places(ranked, held)
        first = jnp.floor(counts.astype(jnp.float32) * self.first_stage + 1e-4)
        first = jnp.maximum(first.astype(jnp.int32), 1)
        chosen = (rank < first[:, None, None]) | jnp.isposinf(base)
        finite = jnp.where(jnp.isfinite(base), base, 0.0)
        return jnp.where(chosen, jnp.inf, (finite + self.epsilon) * memory.slots.norm)


def projected_norm(inputs: LayerInputs) -> Scores:
    """`||W_O^h v||_1` of every token, averaged over the query heads of a KV head.

    Works through the sequence in chunks: the projected values are `E` wide.
    """
    b, kv_heads, s, _ = inputs.v.shape
    h, d, e = inputs.o_proj.shape
    weights = inputs.o_proj.reshape(kv_heads, h // kv_heads, d, e).astype(jnp.float32)
    chunk = int(max(1, min(s, LOGITS_BUDGET // (b * h * e))))
    count = -(-s // chunk)
    v = jnp.pad(inputs.v, [(0, 0), (0, 0), (0, count * chunk - s), (0, 0)])
    v = jnp.moveaxis(v.reshape(b, kv_heads, count, chunk, d), 2, 0)

    def norm(values: Array) -> Array:
        out = jnp.einsum("BKSD,KGDE->BKGSE", values.astype(jnp.float32), weights)
        return jnp.mean(feature_sum(jnp.abs(out)), axis=2)

    norms = norm(v[0])[None] if count == 1 else jax.lax.map(norm, v)
    return jnp.moveaxis(norms, 0, 2).reshape(b, kv_heads, -1)[..., :s]


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class CUR(AbstractScorer):
    """Product of key and value leverage, each relative to its neighbourhood.

    `||k||^2 ||v||^2`, both divided by their sum over blocks of `block` tokens.

    Attributes:
        n_sink: first tokens that are always kept.
        block: tokens that share a normalisation.

    Source: CurDKV (2509.15038); kvpress `CURPress` (`kv_product`, window 16).
    """

    n_sink: Count = 4
    block: Size = sized(16, short=8)

    @property
    def protected(self):
        return self.n_sink

    def score(self, memory, held, counts):
        del memory, counts
        there, order = by_position(held)
        scores = jnp.ones(())
        for x in (there.k, there.v):
            energy = feature_sum(jnp.square(x.astype(jnp.float32)))
            energy = jnp.where(there.live, energy, 0.0)
            scores = scores * energy / block_sums(energy, self.block)
        return protect_first(unsorted(scores, order), held, self.n_sink)


def block_sums(x: Float[Array, "B K S"], block: int) -> Float[Array, "B K S"]:
    """Sum over each token's block of `block` tokens (at least a tiny number)."""
    *lead, s = x.shape
    padded = jnp.pad(x, [(0, 0), (0, 0), (0, -s % block)])
    total = jnp.sum(padded.reshape(*lead, -1, block), axis=-1)
    spread = jnp.repeat(total, block, axis=-1)[..., :s]
    return jnp.maximum(spread, 1e-20)
