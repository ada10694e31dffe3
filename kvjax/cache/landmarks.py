"""Pages of which each has one vector that stands for its keys."""

from typing import ClassVar, final

import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.cache.paging import AbstractPages, log_shares
from kvjax.pallas_kernels.page_score import page_score
from kvjax.pallas_kernels.page_summary import page_summary
from kvjax.turns import flat, row_of, take
from kvjax.types import pytree, static


@final
@pytree
class Landmarks(AbstractPages):
    """All tokens, in pages with a landmark each: pages are ranked by `q . landmark`.

    Beside the budget, every query reads the pages of the first `sinks` tokens of the
    row and those of the last `local` ones in front of it. Landmarks of later blocks are
    the means of their keys.

    Attributes:
        group: how the heads of a GQA group, which read the same pages, are combined:
            by the `sum` of their products, or by the largest softmax share
            (`softmax_max`).
        sinks: the first tokens, by position.
        local: the last tokens in front of a query, itself among them, by position.
    """

    landmark: Float[Array, "*layers B K P D"]
    group: str = static()
    sinks: int = static(default=0)
    local: int = static(default=0)

    SUMMARY: ClassVar = ("landmark",)
    spares: ClassVar[bool] = True

    def summary(self, keys, values, positions):
        del values
        mean = page_summary(keys, positions >= 0, page=self.page).mean
        return {"landmark": mean}

    def always(self, pages):
        return min(pages, always_pages(self.sinks, self.local, self.page))

    def ranked(self, q, q_positions, first, last, seen, spec, turn):
        if self.group == "sum":
            mark, row = flat(self.landmark, turn), row_of(turn, q.shape[0])
            score = page_score(q, mark, mode="dot", group="sum", row=row)
        else:
            mark = take(self.landmark, turn)
            score = jnp.max(log_shares(q, mark, seen, spec), axis=2)
        start = q_positions[:, None, :, None] - self.local
        forced = (first < self.sinks)[:, :, None] | (last[:, :, None] > start)
        return jnp.where(forced, jnp.inf, score)


def always_pages(sinks: int, local: int, page: int) -> int:
    """Pages that the first `sinks` tokens and the last `local` ones may be in."""
    return -(-sinks // page) + (-(-local // page) + 1 if local else 0)
