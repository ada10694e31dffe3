"""What a pass over the prompt leaves behind in one layer: enough for any budget."""

from typing import Any

from jaxtyping import Array, Float

from kvjax.compress.config import Compression, Eviction
from kvjax.schedules import EveryTokens
from kvjax.scorers import AbstractScoreTracker
from kvjax.types import LayerInputs, LayerSpec, Lengths, pytree, static


@pytree
class Observed:
    """What one layer's pass over the prompt leaves: enough for any budget.

    Attributes:
        k, v: `[B, K, S, D]`, keys after RoPE.
        seen: the scorer's observation, or None.
        seed: the tracker's observation, or None.
        key_basis, value_basis: of the model, see `LayerInputs`.
        spec: the layer.
    """

    k: Float[Array, "B K S D"]
    v: Float[Array, "B K S D"]
    seen: Any
    seed: Any
    key_basis: Float[Array, "K D D"] | None = None
    value_basis: Float[Array, "K D D"] | None = None
    spec: LayerSpec = static()


def wants_mass(c: Compression) -> bool:
    """Whether the score of `c` sums attention over all queries."""
    return c.evict is not None and c.evict.score.needs_column_mass


def tracker_of(c: Compression) -> AbstractScoreTracker | None:
    """The decode-time form of the compression's score, or None."""
    if not isinstance(c.schedule, EveryTokens):
        return None
    assert c.evict is not None
    return c.evict.score.tracker(c.schedule.interval)


def observe(
    inputs: LayerInputs,
    lengths: Lengths,
    c: Compression,
    evict: Eviction | None,
    column_mass: Float[Array, "B H S"] | None,
) -> Observed:
    """Look at a prompt's pass once; `build` then works for any budget of `c`.

    Args:
        inputs: the layer's.
        lengths: tokens of each prompt.
        c: what is done.
        evict: of this layer, see `survey.Layout`.
        column_mass: see `wants_mass`.
    """
    tracker = tracker_of(c)
    seen = seed = None
    if evict is not None:
        seen = evict.score.observe(inputs, lengths, column_mass)
    if tracker is not None:
        seed = tracker.observe(inputs, lengths, seen)
    return Observed(
        k=inputs.k,
        v=inputs.v,
        seen=seen,
        seed=seed,
        key_basis=inputs.key_basis,
        value_basis=inputs.value_basis,
        spec=inputs.spec,
    )
