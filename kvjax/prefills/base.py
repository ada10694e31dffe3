"""What attention of a prompt over itself is to the library."""

import abc
import dataclasses
from typing import ClassVar

from jaxtyping import Array, Float

from kvjax.fields import Checked
from kvjax.pallas_kernels.partial import Partial
from kvjax.types import LayerInputs, Lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractPrefill(Checked, abc.ABC):
    """Attention of a prompt over itself."""

    needs_retention: ClassVar[bool] = False
    """Whether the model must have an evictor (`LayerInputs.retention`)."""

    causal: ClassVar[bool] = False
    """Whether every token sees all before it."""

    def suits(self, layers: int, heads: int) -> None:
        """Raise `ValueError` if it is not for a model of so many layers and heads.

        Args:
            layers: of the model.
            heads: query heads of a layer.
        """
        del layers, heads

    @abc.abstractmethod
    def attend(
        self,
        inputs: LayerInputs,
        lengths: Lengths,
        mass: bool,
        past: Partial | None = None,
    ) -> tuple[Float[Array, "B H T D"], Float[Array, "B H S"] | None]:
        """Output `[B, H, T, D]`, and per key the weight received if `mass`.

        Args:
            inputs: the layer's queries, keys and values, right-padded.
            lengths: tokens of each prompt; only those queries are compressed.
            mass: whether a scorer wants column sums.
            past: attention of the same queries over tokens in front of the prompt,
                which is dense; None: there are none.
        """
