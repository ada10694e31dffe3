"""Scores that look at the keys alone: key norm and KeyDiff."""

import dataclasses
from typing import final

import jax.numpy as jnp

from kvjax.scorers._trackers import ContentTracker, negative_norm
from kvjax.scorers.base import AbstractScorer, live_tokens


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class KNorm(AbstractScorer):
    """Tokens whose keys are short: `-||k||`, after RoPE.

    Source: A Simple and Effective L2 Norm-Based Strategy (2406.11430); kvpress
    `KnormPress`.
    Deviations: none (the paper leaves the first two layers alone).
    """

    def observe(self, inputs, lengths, column_mass):
        del lengths, column_mass
        return negative_norm(inputs.k)

    def tracker(self, interval):
        return ContentTracker(interval=interval, score="knorm", n_sink=0)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyDiff(AbstractScorer):
    """Tokens whose keys differ from the rest: `-cos(k, mean(k / ||k||))`.

    Source: KeyDiff (2504.15364); kvpress `KeyDiffPress`.
    """

    def observe(self, inputs, lengths, column_mass):
        del column_mass
        keys = inputs.k.astype(jnp.float32)
        live = live_tokens(lengths, keys.shape[2])[..., None]
        keys = jnp.where(live, keys, 0)
        unit = keys / jnp.maximum(_norm(keys), 1e-12)
        anchor = jnp.sum(unit, axis=2, keepdims=True)
        anchor = anchor / lengths[:, None, None, None].astype(jnp.float32)
        return -jnp.sum(unit * anchor / jnp.maximum(_norm(anchor), 1e-12), axis=-1)


def _norm(x):
    return jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))
