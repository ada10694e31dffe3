"""Contract of reads: which held tokens does a decode step attend to?"""

import abc
import dataclasses
from typing import Any, ClassVar, Self

from jaxtyping import Array, Float

from kvjax.cache import AbstractPart, PageBudget, Slots
from kvjax.config import sized
from kvjax.fields import Checked, Fraction, Positive
from kvjax.types import Held, LayerInputs, LayerSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractRead(Checked, abc.ABC):
    """Which held tokens a decode step attends to; holds hyper-parameters only."""

    whole: ClassVar[bool] = False
    """Whether it is everything, so that parts stay what they are. What is not whole
    wants one capacity for all heads, and tokens that stay where they are."""

    needs_mass: ClassVar[bool] = False
    """Whether `observe` wants what each token received of every query's attention."""

    exact: ClassVar[bool] = False
    """Whether `index` looks at tokens as they were before they were encoded."""

    @property
    def observes(self) -> bool:
        """Whether it looks at a prompt as a whole (`observe`)."""
        return type(self).observe is not AbstractRead.observe

    @property
    def block(self) -> int:
        """Tokens that move into the body together; 0: later ones stay plain, and read.

        A multiple of `page`.
        """
        return 0

    @property
    def page(self) -> int:
        """Slots that are read as one, which codecs must decode by themselves."""
        return 1

    @property
    def kept(self) -> float | None:
        """Fraction of what is held that a step reads, if that is a budget."""
        return None

    def with_keep(self, keep: float) -> Self:
        """The same at another fraction."""
        raise AssertionError(f"{type(self).__name__} reads everything; got {keep}")

    def observe(
        self,
        asked: LayerInputs,
        held: Held,
        mass: Float[Array, "B H S"] | None,
    ) -> Any:
        """What is to be known of the prompt's tokens; budgets have no part in it.

        Args:
            asked: the prompt's queries.
            held: its tokens.
            mass: softmax weight of each, summed over the queries; if it `needs_mass`.

        Returns:
            Leaves `[B, K, S, ...]`, of which `index` gets those of its slots.
        """
        del asked, held, mass
        return ()

    @abc.abstractmethod
    def index(
        self, part: Slots, exact: Slots, seen: Any, spec: LayerSpec
    ) -> tuple[AbstractPart, ...]:
        """The same tokens in parts that know what to read.

        Args:
            part: what is held, in whole pages; with `filled` if there is a `block`.
            exact: the same slots before they were encoded.
            seen: what was observed of them; anything in free ones.
            spec: of the layer.

        Returns:
            Parts that hold each token once; later blocks go to the first.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractBudgeted(AbstractRead):
    """A read of the best pages.

    Attributes:
        keep: fraction of the held pages that a step reads, rounded up; or
        slots: tokens that a step reads, rounded up to whole pages.
    """

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
    def kept(self):
        return self.keep

    def with_keep(self, keep):
        return dataclasses.replace(self, keep=keep, slots=None)

    @property
    def budget(self) -> PageBudget:
        """How many of the held pages a step reads."""
        if self.slots is None:
            return PageBudget(keep=self.keep)
        return PageBudget(pages=-(-self.slots // self.page))
