"""The bound arguments of `column_stats`, as its backends take them."""

from typing import final

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.types import pytree, static


@final
@pytree
class ColumnArgs:
    """One call, checked; `api.column_stats` says what each argument is."""

    q: Float[Array, "B H T D"]
    keys: Float[Array, "B K S D"]
    q_positions: Int[Array, "B T"]
    k_positions: Int[Array, "B S"]
    weights: Float[Array, "B H T"] | None
    lse: Float[Array, "B H T"] | None
    scale: float = static()
    window: int | None = static()
    softcap: float | None = static()
    slash: bool = static()

    @property
    def factors(self) -> Float[Array, "B H T"]:
        """The weights; 1 where none are given."""
        if self.weights is None:
            return jnp.ones(self.q.shape[:3], jnp.float32)
        return self.weights
