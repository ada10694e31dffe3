"""Pages by the bounds of their keys (Quest)."""

import dataclasses
from typing import Annotated, final

from kvjax.cache import Pages
from kvjax.fields import Range
from kvjax.pallas_kernels.page_summary import page_summary
from kvjax.reads.base import AbstractBudgeted


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Quest(AbstractBudgeted):
    """The pages with the highest upper bound on `q . k`; nothing is dropped.

    Attributes:
        page: tokens per page.

    Source: Quest (2406.10774) section 3 (page 16; its first two layers read everything,
    which is a matter of `Compression.layers`).
    Deviations: the heads of a GQA group share their pages; tokens since the last
    full page are always read.
    """

    page: Annotated[int, Range(1, 2**16)] = 16  # type: ignore[override]

    @property
    def block(self):
        return self.page

    def index(self, part, exact, seen, spec):
        del exact, seen
        assert part.filled is not None
        keys = part.keys.decode(part.positions, spec.rope)
        low, high, _ = page_summary(keys, part.positions >= 0, page=self.page)
        paged = Pages(
            keys=part.keys,
            values=part.values,
            positions=part.positions,
            low=low,
            high=high,
            budget=self.budget,
            filled=part.filled,
            page=self.page,
        )
        return (paged,)
