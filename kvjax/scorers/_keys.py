"""Scores that look at the keys alone: key norm and KeyDiff."""

import dataclasses
from typing import ClassVar, final

import jax.numpy as jnp

from kvjax.pallas_kernels.partial import feature_sum
from kvjax.scorers.base import AbstractScorer


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class KNorm(AbstractScorer):
    """Tokens whose keys are short: `-||k||`, after RoPE.

    Source: A Simple and Effective L2 Norm-Based Strategy (2406.11430); kvpress
    `KnormPress`.
    Deviations: none (the paper leaves the first two layers alone).
    """

    per_head: ClassVar[bool] = True

    def score(self, memory, held, counts):
        del memory, counts
        return -_norm(held.k.astype(jnp.float32))[..., 0]


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyDiff(AbstractScorer):
    """Tokens whose keys differ from the rest: `-cos(k, mean(k / ||k||))`.

    Source: KeyDiff (2504.15364); kvpress `KeyDiffPress`.
    """

    def score(self, memory, held, counts):
        del memory, counts
        keys = held.cleared().k.astype(jnp.float32)
        unit = keys / jnp.maximum(_norm(keys), 1e-12)
        count = jnp.maximum(jnp.sum(held.live, axis=-1), 1).astype(jnp.float32)
        anchor = jnp.sum(unit, axis=2, keepdims=True) / count[..., None, None]
        return -feature_sum(unit * anchor / jnp.maximum(_norm(anchor), 1e-12))


def _norm(x):
    return jnp.sqrt(feature_sum(x * x)[..., None])
