"""PyramidKV: fewer slots with depth."""

import dataclasses
import math
from fractions import Fraction
from typing import Annotated, final

import numpy as np

from kvjax import exact
from kvjax.budgets.base import AbstractBudget, same_in_all
from kvjax.config import sized
from kvjax.fields import Range, Size


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Pyramid(AbstractBudget):
    """Slots fall linearly from the first layer to the last; their mean is the budget.

    With `c` slots on average, the window among them, the last layer gets `c / beta`
    and the first `2 c - c / beta`, clipped to the tokens before the window.

    Layer `d` of `L` has `c + u e` slots, `e = 1 - 2 d / (L - 1)`: `u = c - c / beta`,
    or the `N - window - c` tokens that the first layer can have beyond `c` if these are
    fewer. Rounded by largest remainder, ties to the lower layer: layers `d` and
    `L - 1 - d` have `c + x` and `c - x`, so that of their two remainders, which sum to
    1, the larger is rounded up and the other down. What is left of all layers is one
    slot for each such pair: `c + x` is rounded to the nearest, away from `c` if it is
    half-way, and no layer needs to know the others. In exact arithmetic, `beta` being
    the shortest decimal it prints as; in floats a tie falls to either side.

    Attributes:
        beta: steepness.
        window: newest tokens that every layer keeps, counted in its budget.

    Source: PyramidKV (2406.02069) section 4; kvpress `PyramidKVPress` (beta 20).
    Deviations: layers are rounded by largest remainder, so that they sum exactly to
    `L` times the mean budget; where kvpress' constraint `max >= min >= window` fails
    the budget is uniform, as there.
    """

    beta: Annotated[float, Range(1)] = sized(20.0, short=2.0)
    window: Size = sized(64, short=8, recent=True)

    def by_layer(self, mean, lengths, specs):
        layers = len(specs)
        if layers == 1:
            return same_in_all(mean, specs)
        xp = exact.namespace(mean, lengths)
        places = layers - 1 - 2 * np.arange(layers, dtype=np.int32)
        slopes = tuple(Fraction(abs(int(e)), layers - 1) for e in places)
        steep = 1 - 1 / exact.decimal(self.beta)
        spare = lengths - min(self.window, exact.LONGEST) - mean
        # Otherwise the last layer would have less than the window, or the first less
        # than the mean.
        valid = (spare >= 0) & ((lengths <= 2 * mean) | (mean >= self._least))
        half = Fraction(1, 2)
        steps = exact.floor_shares(mean, tuple(steep * s for s in slopes), half)
        clipped = exact.floor_shares(xp.maximum(spare, 0), slopes, half)
        steps = xp.where(valid, xp.minimum(steps, clipped), 0)
        return mean + np.sign(places)[:, None] * steps

    @property
    def _least(self) -> int:
        """The mean from which on the last layer holds the window."""
        return min(math.ceil(self.window * exact.decimal(self.beta)), exact.LONGEST + 1)

    def turns(self, longest, specs, slot_bytes):
        """See `AbstractBudget.turns`: budgets of late layers fall where it is steep.

        Let `c` be the mean, `w` the window and `N` a length. A row is steep if
        `N - c >= w`, and `N <= 2 c` or `c >= w beta`. Neither `c` nor `N - c` falls, or
        rises by more than 1, from a length to the next, and so `u` does not. Then

        * early layers have `c` or more, and do not fall among steep lengths: the most
          is at the last of them or at `longest`;
        * late layers have `c` or fewer: the most of flat lengths is at the last one;
          of steep ones, with the same `c` at the shortest, and there it does not fall
          with `c`, where another `c` takes at most one more of `N - c` (a `keep` of
          1/2 or more).

        With a smaller `keep`, `N <= 2 c` says that `c` is `N / 2` rounded up: all odd
        lengths up to one and all even ones up to another, and among either nothing
        falls. Beyond, `u` and the rest depend on `c` alone.
        """
        limit = self._limit(specs, slot_bytes)
        if limit is not None:
            found = [longest, min(2 * limit, longest), min(limit, longest)]
            return np.unique(found)
        assert self.keep is not None
        keep = exact.decimal(self.keep)
        deep = _first(self._least, keep)  # from here on the last layer has the window
        found = [longest, longest - 1, deep - 1, deep - 2]
        if keep < 1:
            beyond = math.ceil(self.window / (1 - keep))  # `N - c >= w` from here on
            found += [beyond - 1, beyond]
        if 2 * keep < 1:
            even, odd = (math.ceil(n / (1 - 2 * keep)) - 1 for n in (2, 1))
            even, odd = min(even, longest), min(odd, longest)
            found += [even - even % 2, odd - (odd + 1) % 2]
        else:
            found.append(_first(math.ceil(keep * longest), keep))
        return np.unique([n for n in found if 0 <= n <= longest])


def _first(slots: int, keep: Fraction) -> int:
    """The shortest row of which `keep` is `slots`."""
    return math.floor((slots - 1) / keep) + 1
