"""What becomes of the tokens that are dropped."""

import abc
import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool

from kvjax.fields import Checked
from kvjax.types import EMPTY, Held, Keys, Scores, Values


class AbstractMerge(Checked, abc.ABC):
    """Puts what is dropped into what stays: after a prompt, and while decoding."""

    @abc.abstractmethod
    def merged(
        self, held: Held, kept: Bool[Array, "B K S"], scores: Scores
    ) -> tuple[Keys, Values]:
        """Keys and values of what stays, with what was dropped in them.

        What gets nothing keeps every bit.

        Args:
            held: the tokens that there are, see `present`.
            kept: which of them stay; what is neither free nor kept is dropped.
            scores: what ranked them, token by token and unprotected: finite, but in
                free slots, where they are anything.

        Returns:
            `[B, K, S, D]` each; of tokens that do not stay, anything.
        """


def present(held: Held) -> Held:
    """What may be merged: zeros in free slots, and no token that left the window.

    What nothing can see any more is absent: it is not dropped, and receives nothing.
    """
    window = held.spec.window
    if window is not None:
        seen = held.positions > held.seen[:, None, None] - 1 - window
        positions = jnp.where(seen, held.positions, EMPTY)
        held = dataclasses.replace(held, positions=positions, in_order=False)
    return held.cleared()
