"""Contract of budgets, and the uniform one."""

import abc
import dataclasses
import functools
from fractions import Fraction
from typing import Any, ClassVar, final

import numpy as np
from jaxtyping import Array, Int

from kvjax import exact
from kvjax.types import LayerSpec

Specs = tuple[LayerSpec, ...]
"""All layers of a model, the first one first."""

Counts = Int[Array | np.ndarray, "L B"]
RowLengths = Int[Array | np.ndarray, "B"]

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

    Slots are counted where they are asked for, at the lengths of the rows and for all
    layers at once: exact integers (`kvjax.exact`), of rows up to 2**27 tokens. Lengths
    may be traced; NumPy arrays give NumPy arrays and compile nothing. Layers are told
    apart by their places among `specs` alone.

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
    """Whether heads of a layer may get different numbers of slots (see `split`)."""

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
    def by_layer(self, mean: RowLengths, lengths: RowLengths, specs: Specs) -> Any:
        """Slots per head of every layer, `[L, B]`, before they are cut to the row.

        Args:
            mean: slots per head that an average layer gets.
            lengths: row lengths.
            specs: all layers.
        """

    def counts(self, lengths: RowLengths, specs: Specs, slot_bytes: float) -> Any:
        """Slots per head of every layer, `[L, B]`: at least 1 of a row with a token.

        Args:
            lengths: row lengths, NumPy or traced.
            specs: all layers.
            slot_bytes: bytes of one slot of one head, for budgets in bytes.

        Raises:
            ValueError: a byte budget that is below one slot per head.
        """
        xp = exact.namespace(lengths)
        lengths = xp.asarray(lengths, np.int32)
        limit = self._limit(specs, slot_bytes)
        if limit is None:
            assert self.keep is not None
            mean = exact.ceil_share(lengths, self.keep)
        else:
            mean = xp.minimum(lengths, limit)
        slots = self.by_layer(mean, lengths, specs)
        return xp.clip(slots, xp.minimum(lengths, 1), lengths)

    def turns(self, longest: int, specs: Specs, slot_bytes: float) -> np.ndarray:
        """Few lengths among which each layer has the most slots of `0 .. longest`.

        Here for budgets that never fall with the length: the last, and the one from
        which on they are the same.
        """
        limit = self._limit(specs, slot_bytes)
        return np.unique([longest, longest if limit is None else min(longest, limit)])

    def capacities(
        self, longest: int, specs: Specs, slot_bytes: float
    ) -> tuple[int, ...]:
        """Slots per head of every layer that do for all rows of `0 .. longest` tokens.

        The largest of `counts`, not a bound on them.

        Args:
            longest: largest row length.
            specs: all layers.
            slot_bytes: as in `counts`.
        """
        turns = self.turns(longest, specs, slot_bytes)
        most = self.counts(turns, specs, slot_bytes).max(axis=1)
        return tuple(int(slots) for slots in most)

    def bounds(self, specs: Specs, slot_bytes: float) -> tuple[int, ...] | None:
        """Slots per head of every layer for rows of any length; None with `keep`.

        Args:
            specs: all layers.
            slot_bytes: as in `counts`.
        """
        if self.keep is not None:
            return None
        far = self.counts(np.array([exact.LONGEST]), specs, slot_bytes)
        return tuple(int(slots) for slots in far[:, 0])

    def split(
        self, slots: Counts, lengths: RowLengths, specs: Specs
    ) -> tuple[Any, Any]:
        """How the heads of each layer share its slots; for budgets that are `per_head`.

        Args:
            slots: slots per head of each layer, on average.
            lengths: row lengths.
            specs: all layers, of the same number of heads.

        Returns:
            Slots that each head surely gets, `[L, B, K]`, and those of the whole layer,
            `[L, B]`: what is left goes to the highest scores of all heads together.
        """
        raise AssertionError(f"{type(self).__name__} gives all heads the same")

    def flat_capacities(
        self, slots: tuple[int, ...], longest: int, specs: Specs
    ) -> tuple[int, ...]:
        """Slots of all heads that do for all rows: the largest totals of `split`.

        Args:
            slots: slots per head that do for all rows (`AbstractUnit.capacities`).
            longest: largest row length.
            specs: all layers.
        """
        counts, lengths = np.array(slots)[:, None], np.array([longest])
        return tuple(int(x) for x in self.split(counts, lengths, specs)[1][:, 0])

    def _limit(self, specs: Specs, slot_bytes: float) -> int | None:
        """Slots per head that an average layer gets of a long row; None with `keep`."""
        if self.keep is not None:
            return None
        if self.slots is not None:
            return min(self.slots, exact.LONGEST)
        return min(self._affordable(specs[0], len(specs), slot_bytes), exact.LONGEST)

    def _affordable(self, spec: LayerSpec, layers: int, slot_bytes: float) -> int:
        """Slots per head that `bytes` pay for."""
        assert self.bytes is not None
        each = slot_bytes * spec.num_kv_heads * layers
        slots = int(self.bytes // each)
        if slots < 1:
            raise ValueError(
                f"a budget of {self.bytes} bytes is less than one slot per head; one "
                f"slot in every head takes {each:.0f} bytes. Raise `bytes`."
            )
        return slots

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

    def fewest(self, counts: Int[Array | np.ndarray, "..."]) -> Any:
        """Slots that must do for what a score protects in every head, of `counts`."""
        return counts

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
        slots = self._affordable(spec, spec.num_layers, slot_bytes)
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

    def by_layer(self, mean, lengths, specs):
        del lengths
        return same_in_all(mean, specs)

    def layer_counts(self, mean, lengths, spec):
        del lengths, spec
        return mean


def same_in_all(mean: RowLengths, specs: Specs) -> Any:
    """The mean in every layer."""
    xp = exact.namespace(mean)
    return xp.broadcast_to(mean, (len(specs), *mean.shape))


def largest_remainder(shares: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Round `shares [L, N]` to integers whose sum over `L` is exactly `totals [N]`.

    Shares must sum to about `totals`; ties go to the lower layer.
    """
    floor = np.floor(shares + 1e-9).astype(np.int64)
    missing = totals - floor.sum(axis=0)
    order = np.argsort(-(shares - floor), axis=0, kind="stable")
    rank = np.argsort(order, axis=0, kind="stable")
    return floor + (rank < missing)
