"""ExpectedAttention: attention that future queries are expected to pay."""

import dataclasses
from typing import final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.rope import Rope
from kvjax.scorers.base import (
    AbstractScorer,
    group_mean,
    live_tokens,
    positive_int,
    protect_first,
)
from kvjax.types import NEG_INF


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedAttention(AbstractScorer):
    """Attention a Gaussian query is expected to pay at future positions, times ||v||.

    Attributes:
        n_future: future positions whose rotation is averaged.
        n_sink: first tokens, left out of the query statistics and always kept.
        use_covariance: add half the variance of the logit.
        use_vnorm: multiply by the norm of the value.
        epsilon: added to the expected weight before the norm.

    Source: Expected Attention (2510.00636) section 3; kvpress
    `ExpectedAttentionPress` (512, 4, True, True, 0).
    Deviations: queries before RoPE are obtained by rotating back.
    """

    n_future: int = 512
    n_sink: int = 4
    use_covariance: bool = True
    use_vnorm: bool = True
    epsilon: float = 0.0

    def __post_init__(self):
        positive_int("n_future", self.n_future)
        positive_int("n_sink", self.n_sink, 0)

    @property
    def protected(self):
        return self.n_sink

    def observe(self, inputs, lengths, column_mass):
        del column_mass
        spec = inputs.spec
        kv_heads, s, d = inputs.k.shape[1:]
        turn = jnp.maximum(inputs.positions, 0)[:, None, :]
        q = spec.rope.unrotate(inputs.q.astype(jnp.float32), turn)
        index = jnp.arange(s)
        counted = live_tokens(lengths, s) & (index >= self.n_sink)
        mean, cov = _moments(q, counted)
        turned = mean_rotation(spec.rope, lengths, self.n_future)
        mean = jnp.einsum("BXY,BHY->BHX", turned, mean)
        keys = jnp.where(counted[..., None], inputs.k, 0).astype(jnp.float32)
        grouped = mean.reshape(mean.shape[0], kv_heads, -1, d)
        logits = jnp.einsum("BKGD,BKSD->BKGS", grouped, keys) * spec.scale
        if self.use_covariance:
            cov = jnp.einsum("BXY,BHYZ,BWZ->BHXW", turned, cov, turned)
            cov = cov.reshape(cov.shape[0], kv_heads, -1, d, d)
            spread = jnp.einsum("BKSX,BKGXY,BKSY->BKGS", keys, cov, keys)
            logits = logits + 0.5 * spread * spec.scale**2
        logits = jnp.where(counted[:, :, None], logits, NEG_INF)
        weight = jax.nn.softmax(logits, axis=-1)
        weight = weight.reshape(weight.shape[0], -1, s)
        scores = group_mean(weight, kv_heads) + self.epsilon
        if self.use_vnorm:
            scores = scores * jnp.linalg.norm(inputs.v.astype(jnp.float32), axis=-1)
        return protect_first(scores, self.n_sink)


def _moments(q: Float[Array, "B H S D"], counted: Array) -> tuple[Array, Array]:
    """Mean `[B, H, D]` and covariance `[B, H, D, D]` (divided by the count)."""
    weight = counted[..., None].astype(jnp.float32)
    total = jnp.maximum(jnp.sum(weight, axis=2), 1.0)
    q = jnp.where(counted[..., None], q, 0.0)
    mean = jnp.sum(q, axis=2) / total
    centred = (q - mean[:, :, None]) * weight
    cov = jnp.einsum("BHSX,BHSY->BHXY", centred, centred) / total[..., None]
    return mean, cov


def mean_rotation(
    rope: Rope, start: Int[Array, "B"], n_future: int
) -> Float[Array, "B D D"]:
    """Mean rotation matrix over the positions `start .. start + n_future - 1`."""
    positions = start[:, None] + jnp.arange(n_future)[None]
    cos, sin = (jnp.mean(x, axis=1) * rope.magnitude for x in rope.cos_sin(positions))
    half, d = rope.width // 2, rope.head_dim
    low = jnp.arange(half)
    rotation = jnp.zeros((start.shape[0], d, d))
    rotation = rotation.at[:, low, low].set(cos).at[:, low + half, low + half].set(cos)
    rotation = rotation.at[:, low, low + half].set(-sin)
    rotation = rotation.at[:, low + half, low].set(sin)
    rest = jnp.arange(rope.width, d)
    return rotation.at[:, rest, rest].set(1.0)
