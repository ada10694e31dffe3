"""Attention as a decoder calls it, and attention that keeps something."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from kvjax.types import LayerInputs

Attention = Callable[[LayerInputs], Array]


class Carrying:
    """Attention that hands something on from layer to layer.

    An object serves one call of a decoder.

    Args:
        step: `(inputs, state) -> (out, state)`, called once per layer.
        state: of the first layer; there to be read behind the last one.
        behind: `(x, state) -> state`, called with the residual stream `[B T E]` behind
            each layer; None for nothing.
    """

    def __init__(
        self,
        step: Callable[[LayerInputs, Any], tuple[Array, Any]],
        state: Any,
        behind: Callable[[Float[Array, "B T E"], Any], Any] | None = None,
    ):
        self.step = step
        self.state = state
        self.behind = behind

    def __call__(self, inputs: LayerInputs) -> Array:
        """Attention of one layer."""
        out, self.state = self.step(inputs, self.state)
        return out

    def leave(self, x: Float[Array, "B T E"]) -> None:
        """Told of the residual stream behind a layer."""
        if self.behind is not None:
            self.state = self.behind(x, self.state)
