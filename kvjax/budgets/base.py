"""Contract of budgets, and the uniform one."""

import abc
import dataclasses
import functools
from fractions import Fraction
from typing import ClassVar, final

import numpy as np
from jaxtyping import Int

from kvjax.types import LayerSpec

FAR = np.array([2**40])
"""Tokens of a row that no budget in slots or bytes is cut to."""


def slots_to_keep(n_tokens: np.ndarray, keep: float) -> np.ndarray:
    """Slots for a kept fraction of `n_tokens`, rounded up; `keep=1` never evicts.

    Exact: `keep` is taken as the shortest decimal it prints as, so that 0.07 of
    1000 tokens are 70 and not 71.
    """
    share = Fraction(repr(float(keep)))
    exact = np.asarray(n_tokens, dtype=object) * share.numerator
    return np.asarray(-(-exact // share.denominator), dtype=np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractBudget(abc.ABC):
    """Slots per layer and head. Exactly one of `keep`, `slots`, `bytes` is set.

    Attributes:
        keep: kept fraction of each row's tokens, in (0, 1].
        slots: slots per head (mean over heads and layers).
        bytes: bytes per row for all layers and heads, keys and values as stored,
            positions included.
    """

    keep: float | None = None
    slots: int | None = None
    bytes: int | None = None

    per_head: ClassVar[bool] = False
    """Whether heads of a layer may get different numbers of slots (see `shares`)."""

    needs_gates: ClassVar[bool] = False
    """Whether the model must know its heads (`LayerSpec.head_ranks`)."""

    def __post_init__(self):
        given = {
            name: getattr(self, name)
            for name in ("keep", "slots", "bytes")
            if getattr(self, name) is not None
        }
        if len(given) != 1:
            raise ValueError(
                f"set one of `keep`, `slots` and `bytes`; got {given or 'none'}."
            )
        if self.keep is not None and not 0.0 < self.keep <= 1.0:
            raise ValueError(
                f"`keep` is the kept fraction and must be in (0, 1]; got {self.keep}. "
                "kvpress' compression_ratio is the fraction removed: keep = 1 - ratio."
            )
        for name in ("slots", "bytes"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be an integer >= 1; got {value!r}.")

    @abc.abstractmethod
    def layer_counts(
        self, mean: np.ndarray, lengths: np.ndarray, spec: LayerSpec
    ) -> np.ndarray:
        """Slots per head of one layer, `int64` like `lengths`.

        Args:
            mean: slots per head that an average layer gets.
            lengths: row lengths, every integer from 0 up.
            spec: the layer.
        """

    def shares(
        self, slots: np.ndarray, lengths: np.ndarray, spec: LayerSpec
    ) -> tuple[np.ndarray, np.ndarray]:
        """How the heads of a layer share its slots; for budgets that are `per_head`.

        Args:
            slots: slots per head of this layer, on average, `[N]`.
            lengths: row lengths, every integer from 0 up, `[N]`.
            spec: the layer.

        Returns:
            Slots that each head surely gets, `[N, K]`, and those of the whole layer,
            `[N]`: what is left goes to the highest scores of all heads together.
        """
        raise AssertionError(f"{type(self).__name__} gives all heads the same")

    def fewest(self, table: Int[np.ndarray, "N+1"]) -> Int[np.ndarray, "N+1"]:
        """Slots that must do for what a score protects in every head of a `table`."""
        return table

    def table(
        self, longest: int, spec: LayerSpec, slot_bytes: float
    ) -> Int[np.ndarray, "N+1"]:
        """Slots per head of this layer for rows of `0 .. longest` tokens.

        Args:
            longest: largest row length.
            spec: the layer.
            slot_bytes: bytes of one slot of one head, for budgets in bytes.

        Raises:
            ValueError: a byte budget that is below one slot per head.
        """
        return _table(self, longest, spec, slot_bytes)

    def bound(self, spec: LayerSpec, slot_bytes: float) -> int | None:
        """Slots per head of this layer for rows of any length; None with `keep`.

        Args:
            spec: the layer.
            slot_bytes: as in `table`.
        """
        if self.keep is not None:
            return None
        mean = self._mean(FAR, spec, slot_bytes)
        return max(1, int(self.layer_counts(mean, FAR, spec)[0]))

    def _mean(self, lengths: np.ndarray, spec: LayerSpec, slot_bytes: float):
        if self.keep is not None:
            return slots_to_keep(lengths, self.keep)
        if self.slots is not None:
            return np.minimum(lengths, self.slots)
        assert self.bytes is not None
        each = slot_bytes * spec.num_kv_heads * spec.num_layers
        slots = int(self.bytes // each)
        if slots < 1:
            raise ValueError(
                f"a budget of {self.bytes} bytes is less than one slot per head; one "
                f"slot in every head takes {each:.0f} bytes. Raise `bytes`."
            )
        return np.minimum(lengths, slots)


@functools.lru_cache(maxsize=1024)
def _table(budget: AbstractBudget, longest: int, spec: LayerSpec, slot_bytes: float):
    lengths = np.arange(longest + 1)
    mean = budget._mean(lengths, spec, slot_bytes)
    counts = np.clip(budget.layer_counts(mean, lengths, spec), 0, lengths)
    counts = np.maximum(counts, np.minimum(1, lengths)).astype(np.int32)
    counts.setflags(write=False)
    return counts


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform(AbstractBudget):
    """The same number of slots in every layer and head."""

    def layer_counts(self, mean, lengths, spec):
        del lengths, spec
        return mean


def largest_remainder(shares: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Round `shares [L, N]` to integers whose sum over `L` is exactly `totals [N]`.

    Shares must sum to about `totals`; ties go to the lower layer.
    """
    floor = np.floor(shares + 1e-9).astype(np.int64)
    missing = totals - floor.sum(axis=0)
    order = np.argsort(-(shares - floor), axis=0, kind="stable")
    rank = np.argsort(order, axis=0, kind="stable")
    return floor + (rank < missing)
