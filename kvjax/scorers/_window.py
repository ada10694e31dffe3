"""What scores have in common that a row's last queries vote for."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool

from kvjax.config import sized
from kvjax.fields import Kernel, Size
from kvjax.scorers.base import (
    AbstractScorer,
    last_queries,
    ordered,
    position_order,
    unsorted,
)
from kvjax.types import Held, Scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractWindow(AbstractScorer):
    """The last queries vote for the tokens before them, which votes are smoothed.

    Attributes:
        window: queries at the end of the prompt that vote; their own tokens are kept.
        kernel: width of the pooling along the sequence.
    """

    window: Size = sized(64, short=8, recent=True)
    kernel: Kernel = 5

    @property
    def protected(self):
        return self.window

    def row(self, asked, before):
        return last_queries(asked, self.window, before)

    def before(self, held: Held) -> Bool[Array, "B K S"]:
        """Which slots hold a token before the window."""
        return held.live & (held.positions < (held.seen - self.window)[:, None, None])

    def pooled(
        self, votes: Scores, held: Held, pool: Callable[[Array, int], Array]
    ) -> Scores:
        """Votes smoothed in the order of positions.

        Those for the window's own tokens are cut off first: zeros at the border.
        """
        votes = jnp.where(self.before(held), votes, 0.0)
        order = None if self.kernel == 1 else position_order(held)
        return unsorted(pool(ordered(votes, order), self.kernel), order)
