"""What becomes of the tokens that are dropped."""

import abc

import jax.numpy as jnp
from jaxtyping import Array, Bool

from kvjax.types import Held, Keys, Scores, Values


class AbstractMerge(abc.ABC):
    """Puts what is dropped into what stays: after a prompt, and while decoding."""

    @abc.abstractmethod
    def merged(
        self, held: Held, kept: Bool[Array, "B K S"], scores: Scores
    ) -> tuple[Keys, Values]:
        """Keys and values of what stays, with what was dropped in them.

        Args:
            held: the tokens that there are.
            kept: which of them stay; what is neither free nor kept is dropped.
            scores: what ranked them; `+inf` for tokens that always stay.

        Returns:
            `[B, K, S, D]` each; of tokens that do not stay, anything.
        """


def finite(held: Held, scores: Scores) -> Scores:
    """Scores in which tokens that always stay have the largest number of their head.

    Free slots, and tokens that never stay, have the smallest.
    """
    known = held.live & jnp.isfinite(scores)
    most = jnp.max(jnp.where(known, scores, -jnp.inf), axis=-1, keepdims=True)
    least = jnp.min(jnp.where(known, scores, jnp.inf), axis=-1, keepdims=True)
    some = jnp.isfinite(most)
    most, least = jnp.where(some, most, 1.0), jnp.where(some, least, 0.0)
    return jnp.where(known, scores, jnp.where(jnp.isposinf(scores), most, least))
