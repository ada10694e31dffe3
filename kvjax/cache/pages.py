"""Retrieval at read time: pages with key bounds; a query reads the best ones only."""

from typing import ClassVar, final

import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.cache.paging import AbstractPages
from kvjax.pallas_kernels.page_score import page_score
from kvjax.pallas_kernels.page_summary import page_summary
from kvjax.turns import flat, row_of
from kvjax.types import EMPTY, pytree


@final
@pytree
class Pages(AbstractPages):
    """All tokens, in pages of `page` slots with channel-wise key bounds.

    Each query token reads, per KV head, the pages with the highest bound on `q . k`
    (the newest page always among them) and nothing else.

    Source: Quest (2406.10774) section 3. Deviation: the heads of a GQA group read
    the same pages, ranked by the largest bound in the group.
    """

    low: Float[Array, "*layers B K P D"]
    high: Float[Array, "*layers B K P D"]

    SUMMARY: ClassVar = ("low", "high")

    def summary(self, keys, values, positions):
        del values
        low, high, _ = page_summary(keys, positions >= 0, page=self.page)
        return {"low": low, "high": high}

    def ranked(self, q, q_positions, first, last, seen, spec, turn):
        del q_positions, last, spec
        low, high = flat((self.low, self.high), turn)
        row = row_of(turn, q.shape[0])
        score = page_score(q, low, high, mode="bound", group="max", row=row)
        newest = jnp.argmax(jnp.where(seen, first[:, :, None], EMPTY), axis=-1)
        pages = jnp.arange(first.shape[-1])
        return jnp.where(pages == newest[..., None], jnp.inf, score)
