"""TriAttention: what the mean query of a head makes of a key, now and far ahead."""

import dataclasses
from typing import Annotated, final

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from kvjax.fields import OneOf, Range
from kvjax.rope import Rope
from kvjax.scorers.base import AbstractScorer
from kvjax.types import pytree


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class TriAttention(AbstractScorer):
    """The mean query's product with a key, and the key's size times what it misses.

    Queries and keys are pairs of channels that RoPE turns. The product is averaged
    over positions `1, 2, 4, ..` behind the next token; to it comes, pair by pair, the
    size of the key times what the mean size of a query exceeds the size of the mean by.

    Attributes:
        n_offsets: powers of two ahead that are averaged.
        normalise: each query head's scores less their mean, by their deviation.
        group: "max" or "mean" over the query heads of a KV head.

    Cost: two products of held keys with a vector per query head; nothing is remembered
    per token.

    Source: TriAttention (2604.04921); the authors' `pruning_utils.py` and, for each
    layer and head by itself, `triattention.py` (offsets to 65536, their mean, scores
    normalised, the largest of the group).
    Deviations: the query statistics are those of the row's own queries so far, where
    the paper takes them from a calibration set once; channels that RoPE leaves alone
    are turned by nothing, one by one.
    """

    n_offsets: Annotated[int, Range(1, 31)] = 17
    normalise: bool = True
    group: Annotated[str, OneOf("max", "mean")] = "max"

    def row(self, asked, before):
        rope, real = asked.spec.rope, (asked.positions >= 0)[:, None]
        places = jnp.maximum(asked.positions, 0)[:, None]
        q = rope.unrotate(asked.q.astype(jnp.float32), places)
        found = _statistics(jnp.where(real[..., None], q, 0.0), real, rope)
        return found if before is None else _both(before, found)

    def score(self, memory, held, counts):
        del counts
        asked, rope, held = memory.row, held.spec.rope, held.cleared()
        keys, heads = held.k.astype(jnp.float32), held.k.shape[1]

        def grouped(x: Array) -> Array:
            return x.reshape(x.shape[0], heads, -1, x.shape[-1])

        later = rope.rotate(ahead(rope, asked.mean, self.n_offsets), held.seen[:, None])
        product = jnp.einsum("BKGD,BKSD->BKGS", grouped(later), keys)
        # `magnitude` is in the keys once already.
        missed = (asked.size - _sizes(asked.mean, rope)) * _magnitudes(rope)
        sizes = _sizes(keys, rope)
        scores = product + jnp.einsum("BKGC,BKSC->BKGS", grouped(missed), sizes)
        if self.normalise:
            scores = _normalised(scores, held.live[:, :, None])
        return (jnp.max if self.group == "max" else jnp.mean)(scores, axis=2)


@pytree
class _Queries:
    """Of queries before RoPE.

    Attributes:
        count: how many of each row.
        mean: theirs.
        size: mean size of each pair of channels that RoPE turns, and of the others.
    """

    count: Float[Array, "B"]
    mean: Float[Array, "B H D"]
    size: Float[Array, "B H C"]


def _statistics(
    q: Float[Array, "B H T D"], real: Bool[Array, "B 1 T"], rope: Rope
) -> _Queries:
    """Of the `real` ones; the others are 0."""
    count = jnp.sum(real, axis=(1, 2)).astype(jnp.float32)
    total = jnp.maximum(count, 1.0)[:, None, None]
    sizes = jnp.where(real[..., None], _sizes(q, rope), 0.0)
    mean, size = (jnp.sum(x, axis=2) / total for x in (q, sizes))
    return _Queries(count=count, mean=mean, size=size)


def _both(one: _Queries, two: _Queries) -> _Queries:
    """Of two sets of queries together."""
    count = one.count + two.count
    share = (two.count / jnp.maximum(count, 1.0))[:, None, None]
    mean = one.mean + share * (two.mean - one.mean)
    size = one.size + share * (two.size - one.size)
    return _Queries(count=count, mean=mean, size=size)


def _sizes(x: Float[Array, "*shape D"], rope: Rope) -> Float[Array, "*shape C"]:
    """Absolute values of the pairs of channels that RoPE turns, and of the others."""
    half = rope.width // 2
    first, second = x[..., :half], x[..., half : rope.width]
    square = jnp.maximum(first * first + second * second, 1e-24)  # no root of 0
    return jnp.concatenate([jnp.sqrt(square), jnp.abs(x[..., rope.width :])], axis=-1)


def _magnitudes(rope: Rope) -> np.ndarray:
    """What RoPE multiplies each of `_sizes` by."""
    sizes = np.ones(rope.head_dim - rope.width // 2, np.float32)
    sizes[: rope.width // 2] = rope.magnitude
    return sizes


def ahead(
    rope: Rope, x: Float[Array, "*shape D"], n_offsets: int
) -> Float[Array, "*shape D"]:
    """Mean of `x` turned by `1, 2, 4, ..` positions, in size as it is."""
    # Angles of 65536 positions want more than float32.
    angles = 2.0 ** np.arange(n_offsets)[:, None] * rope.frequencies()
    cos, sin = (f(angles).mean(axis=0).astype(np.float32) for f in (np.cos, np.sin))
    half = rope.width // 2
    first, second = x[..., :half], x[..., half : rope.width]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*turned, x[..., rope.width :]], axis=-1)


def _normalised(
    scores: Float[Array, "B K G S"], live: Bool[Array, "B K 1 S"]
) -> Float[Array, "B K G S"]:
    """Less the mean of the live ones, by their deviation."""
    count = jnp.maximum(jnp.sum(live, axis=-1, keepdims=True), 1).astype(jnp.float32)
    mean = jnp.sum(jnp.where(live, scores, 0.0), axis=-1, keepdims=True) / count
    apart = jnp.where(live, scores - mean, 0.0)
    variance = jnp.sum(apart * apart, axis=-1, keepdims=True) / count
    return apart / jnp.sqrt(jnp.maximum(variance, 1e-12))
