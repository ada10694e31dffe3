"""Which blocks does prefill attention compute?"""

import abc
import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kvjax.pallas_kernels.column_stats import column_stats
from kvjax.pallas_kernels.dense import attention_with_mass
from kvjax.scorers.base import last_queries, positive_int
from kvjax.types import NEG_INF, LayerInputs, Lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractPrefill(abc.ABC):
    """Attention of a prompt over itself."""

    @abc.abstractmethod
    def attend(
        self, inputs: LayerInputs, lengths: Lengths, mass: bool
    ) -> tuple[Float[Array, "B H T D"], Float[Array, "B H S"] | None]:
        """Output `[B, H, T, D]`, and per key the weight received if `mass`.

        Args:
            inputs: the layer's queries, keys and values, right-padded.
            lengths: tokens of each prompt; only those queries are compressed.
            mass: whether a scorer wants column sums.
        """


def _run(inputs: LayerInputs, mass: bool, allowed=None):
    spec = inputs.spec
    part, received = attention_with_mass(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.positions,
        inputs.positions,
        scale=spec.scale,
        window=spec.window,
        softcap=spec.softcap,
        allowed=allowed,
        mass=mass,
    )
    return part.out, received


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense(AbstractPrefill):
    """Full causal attention."""

    def attend(self, inputs, lengths, mass):
        del lengths
        return _run(inputs, mass)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class VerticalSlash(AbstractPrefill):
    """Some columns and some diagonals per head, chosen by the last queries.

    Attributes:
        vertical: columns kept per head.
        slash: diagonals kept per head.
        last_q: queries at the end of the prompt that choose.
        first: columns at the start that are always kept.
        local: diagonals next to the main one that are always kept.

    Source: MInference (2407.02490) section 3 and `vertical_and_slash_kernel`
    (1000 / 6096 / 64 / 30 / 100).
    Deviations: every diagonal is kept exactly, where the CUDA index widens it to
    blocks of 64; this is the XLA path, which masks and does not yet skip.
    """

    vertical: int = 1000
    slash: int = 6096
    last_q: int = 64
    first: int = 30
    local: int = 100

    def __post_init__(self):
        for name in ("vertical", "slash", "last_q"):
            positive_int(name, getattr(self, name))
        for name in ("first", "local"):
            positive_int(name, getattr(self, name), 0)

    def attend(self, inputs, lengths, mass):
        columns, diagonals = self.pattern(inputs, lengths)

        def allowed(q_positions: Array, k_positions: Array) -> Array:
            offset = q_positions[:, :, None] - k_positions[:, None, :]
            index = jnp.clip(offset, 0, diagonals.shape[-1] - 1)
            on_slash = jax.vmap(lambda d, i: d[:, i])(diagonals, index)
            return columns[:, :, None, :] | on_slash

        return _run(inputs, mass, allowed)

    def pattern(
        self, inputs: LayerInputs, lengths: Lengths
    ) -> tuple[Bool[Array, "B H S"], Bool[Array, "B H S"]]:
        """Kept columns, and kept diagonals by their distance `q - k`."""
        queries, positions = last_queries(inputs, lengths, self.last_q)
        spec = inputs.spec
        stats = column_stats(
            queries,
            inputs.k,
            positions,
            inputs.positions,
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap,
            slash=True,
        )
        assert stats.slash is not None
        index = jnp.arange(stats.sum.shape[-1])
        live = (index < lengths[:, None])[:, None]
        vertical = jnp.where(index < self.first, jnp.inf, stats.sum)
        slash = jnp.where(index < self.local, jnp.inf, stats.slash)
        return (
            _top(jnp.where(live, vertical, NEG_INF), self.vertical),
            _top(jnp.where(live, slash, NEG_INF), self.slash),
        )


def _top(scores: Float[Array, "B H S"], count: int) -> Bool[Array, "B H S"]:
    """The `count` highest finite-or-inf scores of each row, ties to the left."""
    s = scores.shape[-1]
    if count >= s:
        return scores > NEG_INF
    order = jnp.argsort(-scores, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    return (rank < count) & (scores > NEG_INF)


PREFILLS: Mapping[str, type[AbstractPrefill]] = MappingProxyType(
    {"dense": Dense, "vertical_slash": VerticalSlash}
)
