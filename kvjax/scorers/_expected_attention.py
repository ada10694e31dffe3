"""ExpectedAttention: attention that future queries are expected to pay."""

import dataclasses
import math
from typing import Annotated, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.config import sized
from kvjax.fields import Amount, Count, Range
from kvjax.pallas_kernels.partial import feature_sum
from kvjax.rope import Rope
from kvjax.scorers.base import AbstractScorer, protect_first
from kvjax.types import NEG_INF, Held, Scores, pytree


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
    Deviations: queries before RoPE are obtained by rotating back; tokens that are only
    compared are so by logarithms.
    """

    n_future: Annotated[int, Range(1, 2**20)] = sized(512, short=32)
    n_sink: Count = 4
    use_covariance: bool = True
    use_vnorm: bool = True
    epsilon: Amount = 0.0

    @property
    def protected(self):
        return self.n_sink

    def row(self, asked, before):
        positions = asked.positions
        q = asked.spec.rope.unrotate(
            asked.q.astype(jnp.float32), jnp.maximum(positions, 0)[:, None, :]
        )
        counted = (positions >= self.n_sink)[:, None]
        found = _moments(q, counted, self.use_covariance)
        return found if before is None else _both(before, found)

    def score(self, memory, held, counts):
        del counts
        scores = jnp.exp(self._logs(memory.row, held)) + self.epsilon
        if self.use_vnorm:
            scores = scores * _sizes(held)
        return protect_first(scores, held, self.n_sink)

    def ranked(self, memory, held, counts):
        """Logarithms: of a sharp head, most weights are 0 in float32."""
        del counts
        logs = self._logs(memory.row, held)
        if self.epsilon > 0:
            logs = jnp.logaddexp(logs, math.log(self.epsilon))
        if self.use_vnorm:
            tiny = jnp.finfo(jnp.float32).tiny  # -inf would say that it never stays
            logs = logs + jnp.log(jnp.maximum(_sizes(held), tiny))
        return protect_first(logs, held, self.n_sink)

    def _logs(self, asked: "_Moments", held: Held) -> Scores:
        """Logarithms of the expected weights, averaged over the query group."""
        spec = held.spec
        (b, kv_heads, _, d), h = held.k.shape, asked.mean.shape[1]
        counted = held.positions >= self.n_sink
        turned = mean_rotation(spec.rope, held.seen, self.n_future)
        mean = jnp.einsum("BXY,BHY->BHX", turned, asked.mean)
        keys = jnp.where(counted[..., None], held.k, 0).astype(jnp.float32)
        grouped = mean.reshape(b, kv_heads, -1, d)
        logits = jnp.einsum("BKGD,BKSD->BKGS", grouped, keys) * spec.scale
        if self.use_covariance:
            cov = jnp.einsum("BXY,BHYZ,BWZ->BHXW", turned, asked.cov, turned)
            cov = cov.reshape(b, kv_heads, -1, d, d)
            spread = jnp.einsum("BKSX,BKGXY,BKSY->BKGS", keys, cov, keys)
            logits = logits + 0.5 * spread * spec.scale**2
        logits = jnp.where(counted[:, :, None], logits, NEG_INF)
        logs = jax.nn.log_softmax(logits, axis=-1)
        # Not of -inf alone, whose slope is no number.
        logs = jnp.where(counted[:, :, None], logs, 0.0)
        logs = jax.nn.logsumexp(logs, axis=2) - math.log(h // kv_heads)
        return jnp.where(counted, logs, NEG_INF)


def _sizes(held: Held) -> Scores:
    """Norms of the values."""
    values = held.v.astype(jnp.float32)
    return jnp.sqrt(feature_sum(values * values))


@pytree
class _Moments:
    """Of queries before RoPE.

    Attributes:
        count: how many of each row.
        mean: theirs.
        cov: covariance, divided by the count; None where it is not wanted.
    """

    count: Float[Array, "B"]
    mean: Float[Array, "B H D"]
    cov: Float[Array, "B H D D"] | None


def _moments(q: Float[Array, "B H T D"], counted: Array, covariance: bool) -> _Moments:
    weight = counted[..., None].astype(jnp.float32)
    count = jnp.sum(weight, axis=(1, 2, 3))
    total = jnp.maximum(count, 1.0)[:, None, None]
    q = jnp.where(counted[..., None], q, 0.0)
    mean = jnp.sum(q, axis=2) / total
    cov = None
    if covariance:
        centred = (q - mean[:, :, None]) * weight
        cov = jnp.einsum("BHSX,BHSY->BHXY", centred, centred) / total[..., None]
    return _Moments(count=count, mean=mean, cov=cov)


def _both(one: _Moments, two: _Moments) -> _Moments:
    """Moments of two sets of queries together."""
    count = one.count + two.count
    share = (two.count / jnp.maximum(count, 1.0))[:, None, None]
    apart = two.mean - one.mean
    cov = None
    if one.cov is not None and two.cov is not None:
        part = share[..., None]
        between = apart[..., :, None] * apart[..., None, :]
        cov = (1 - part) * one.cov + part * two.cov + part * (1 - part) * between
    return _Moments(count=count, mean=one.mean + share * apart, cov=cov)


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
