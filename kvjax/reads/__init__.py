"""What does each decode step look at?"""

import abc
import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, final

import numpy as np
from jaxtyping import Array, Int

from kvjax.cache import PageBudget
from kvjax.scorers.base import positive_int


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractRead(abc.ABC):
    """Which held tokens a decode step attends to."""

    @abc.abstractmethod
    def page_of(self, layer: int) -> int | None:
        """Page size of a layer, counted from 0; None if it reads everything."""


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class All(AbstractRead):
    """Everything that is held."""

    def page_of(self, layer):
        del layer
        return None


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Quest(AbstractRead):
    """The pages with the highest upper bound on `q . k`; nothing is dropped.

    Attributes:
        page: tokens per page.
        keep: fraction of the held pages that a step reads, rounded up; or
        slots: tokens that a step reads, rounded up to whole pages.
        dense_layers: first layers that read everything.

    Source: Quest (2406.10774) section 3 (page 16, two dense layers).
    Deviations: the heads of a GQA group share their pages; tokens since the last
    full page are always read.
    """

    page: int = 16
    keep: float | None = 0.25
    slots: int | None = None
    dense_layers: int = 2

    def __post_init__(self):
        positive_int("page", self.page)
        positive_int("dense_layers", self.dense_layers, 0)
        if (self.keep is None) == (self.slots is None):
            raise ValueError(
                f"set exactly one of `keep` and `slots`; got keep={self.keep}, "
                f"slots={self.slots}."
            )
        if self.keep is not None and not 0.0 < self.keep <= 1.0:
            raise ValueError(
                f"`keep` is the fraction read and must be in (0, 1]; got {self.keep}."
            )
        if self.slots is not None:
            positive_int("slots", self.slots)

    def page_of(self, layer):
        return None if layer < self.dense_layers else self.page

    @property
    def budget(self) -> PageBudget:
        """How many of the held pages a step reads."""
        if self.slots is None:
            return PageBudget(keep=self.keep)
        return PageBudget(pages=-(-self.slots // self.page))

    def pages(self, held: Int[Array | np.ndarray, "..."]) -> Any:
        """Pages to read when `held` pages are, NumPy or traced."""
        return self.budget.read(held)

    def most_pages(self, pages: int) -> int:
        """The most that is read when up to `pages` pages are held."""
        return int(self.pages(np.array(pages)))


READS: Mapping[str, type[AbstractRead]] = MappingProxyType({"all": All, "quest": Quest})
