"""What does each decode step look at?"""

import abc
import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Self, final

import numpy as np
from jaxtyping import Array, Int

from kvjax.cache import AbstractPart, PageBudget, Pages, Slots
from kvjax.config import sized
from kvjax.fields import Checked, Fraction, Positive, Range
from kvjax.pallas_kernels.page_summary import page_summary
from kvjax.types import LayerSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractRead(Checked, abc.ABC):
    """Which held tokens a decode step attends to."""

    @property
    def block(self) -> int:
        """Tokens that move into the body together; 0: the body never changes."""
        return 0

    @property
    def kept(self) -> float | None:
        """Fraction of what is held that a step reads, if that is a budget."""
        return None

    def with_keep(self, keep: float) -> Self:
        """The same at another fraction."""
        raise AssertionError(f"{type(self).__name__} reads everything; got {keep}")

    @abc.abstractmethod
    def index(self, part: Slots, spec: LayerSpec) -> AbstractPart:
        """The same slots in a part that knows what to read.

        Args:
            part: what is held; with `filled` if there is a `block`.
            spec: of the layer.
        """


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class All(AbstractRead):
    """Everything that is held."""

    def index(self, part, spec):
        del spec
        return part


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Quest(AbstractRead):
    """The pages with the highest upper bound on `q . k`; nothing is dropped.

    Attributes:
        page: tokens per page.
        keep: fraction of the held pages that a step reads, rounded up; or
        slots: tokens that a step reads, rounded up to whole pages.

    Source: Quest (2406.10774) section 3 (page 16; its first two layers read everything,
    which is a matter of `Compression.layers`).
    Deviations: the heads of a GQA group share their pages; tokens since the last
    full page are always read.
    """

    page: Annotated[int, Range(1, 2**16)] = 16
    keep: Fraction | None = 0.25
    slots: Positive | None = sized(None, short=24)

    def __post_init__(self):
        super().__post_init__()
        if (self.keep is None) == (self.slots is None):
            raise ValueError(
                f"set exactly one of `keep` and `slots`; got keep={self.keep}, "
                f"slots={self.slots}."
            )

    @property
    def block(self):
        return self.page

    @property
    def kept(self):
        return self.keep

    def with_keep(self, keep):
        return dataclasses.replace(self, keep=keep, slots=None)

    def index(self, part, spec):
        assert part.filled is not None
        keys = part.keys.decode(part.positions, spec.rope)
        low, high, _ = page_summary(keys, part.positions >= 0, page=self.page)
        return Pages(
            keys=part.keys,
            values=part.values,
            positions=part.positions,
            low=low,
            high=high,
            budget=self.budget,
            filled=part.filled,
            page=self.page,
            most=self.most_pages(part.positions.shape[-1] // self.page),
        )

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
