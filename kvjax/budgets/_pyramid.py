"""PyramidKV: fewer slots with depth."""

import dataclasses
from typing import final

import numpy as np

from kvjax.budgets.base import AbstractBudget, largest_remainder


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Pyramid(AbstractBudget):
    """Slots fall linearly from the first layer to the last; their mean is the budget.

    With `c` slots behind the window on average, the last layer gets `c / beta` and
    the first `2 c - c / beta` of them, clipped to what the prompt has.

    Attributes:
        beta: steepness.
        window: newest tokens that every layer keeps, counted in its budget.

    Source: PyramidKV (2406.02069) section 4; kvpress `PyramidKVPress` (beta 20).
    Deviations: layers are rounded by largest remainder, so that they sum exactly to
    `L` times the mean budget; where kvpress' constraint `max >= min >= window` fails
    the budget is uniform, as there.
    """

    beta: float = 20.0
    window: int = 64

    def __post_init__(self):
        super().__post_init__()
        if self.beta < 1:
            raise ValueError(f"`beta` must be at least 1; got {self.beta}.")
        if self.window < 1:
            raise ValueError(f"`window` must be at least 1; got {self.window}.")

    def layer_counts(self, mean, lengths, spec):
        layers = spec.num_layers
        if layers == 1:
            return mean
        behind = mean.astype(np.float64)  # the window is inside the budget
        least = behind / self.beta
        most = 2 * behind - least
        clipped = most >= lengths - self.window
        most = np.where(clipped, lengths - self.window, most)
        least = np.where(clipped, 2 * behind - most, least)
        valid = (lengths >= most) & (most >= least) & (least >= self.window)
        depth = np.arange(layers)[:, None]
        shares = most - depth * (most - least) / (layers - 1)
        shares = np.where(valid, shares, behind)
        return largest_remainder(shares, layers * mean)[spec.index]
