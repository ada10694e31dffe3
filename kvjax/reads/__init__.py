"""What does each decode step look at?"""

import abc
import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import final

import numpy as np

from kvjax.budgets import slots_to_keep
from kvjax.scorers.base import positive_int
from kvjax.types import LayerSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractRead(abc.ABC):
    """Which held tokens a decode step attends to."""

    @abc.abstractmethod
    def page_of(self, spec: LayerSpec) -> int | None:
        """Page size of this layer, or None if it reads everything."""


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class All(AbstractRead):
    """Everything that is held."""

    def page_of(self, spec):
        del spec
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

    def page_of(self, spec):
        return None if spec.index < self.dense_layers else self.page

    def pages(self, most: int) -> np.ndarray:
        """Pages to read when `0 .. most` pages are held."""
        held = np.arange(most + 1)
        if self.keep is not None:
            read = slots_to_keep(held, self.keep)
        else:
            read = np.full_like(held, -(-(self.slots or 1) // self.page))
        return np.clip(read, 1, np.maximum(held, 1)).astype(np.int32)


READS: Mapping[str, type[AbstractRead]] = MappingProxyType({"all": All, "quest": Quest})
