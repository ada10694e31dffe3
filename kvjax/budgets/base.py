"""Contract of budgets, and the uniform one."""

import abc
import dataclasses
from typing import Any, ClassVar, Self, final

import numpy as np
from jaxtyping import Array, Float, Int

from kvjax import exact
from kvjax.config import sized
from kvjax.fields import Bytes, Checked, Kept, Positive
from kvjax.types import Held, LayerInputs, LayerSpec

Specs = tuple[LayerSpec, ...]
"""All layers of a model, the first one first."""

Counts = Int[Array | np.ndarray, "L B"]
RowLengths = Int[Array | np.ndarray, "B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractBudget(Checked, abc.ABC):
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

    keep: Kept | None = None
    slots: Positive | None = sized(None, short=24)
    bytes: Bytes | None = None

    per_head: ClassVar[bool] = False
    """Whether heads of a layer may get different numbers of slots (see `split`)."""

    needs_gates: ClassVar[bool] = False
    """Whether the model must know its heads (`LayerSpec.head_ranks`)."""

    surveys: ClassVar[bool] = False
    """Whether layers share by what is found in all of them (see `allot`)."""

    weighs: ClassVar[bool] = False
    """Whether it makes more of scores than an order (see `AbstractRanking.ranked`)."""

    even: ClassVar[bool] = False
    """Whether all layers and heads get the same."""

    parts: ClassVar[bool] = False
    """Whether some of a layer's heads may share their part of its slots (`split`), for
    no head surely gets more than its own."""

    def __post_init__(self):
        super().__post_init__()
        given = {
            name: getattr(self, name)
            for name in ("keep", "slots", "bytes")
            if getattr(self, name) is not None
        }
        if len(given) != 1:
            raise ValueError(
                f"set one of `keep`, `slots` and `bytes`; got {given or 'none'}."
            )

    def with_keep(self, keep: float) -> Self:
        """The same with the kept fraction `keep`, in place of any other unit."""
        return dataclasses.replace(self, keep=keep, slots=None, bytes=None)

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

    def look(self, asked: LayerInputs, held: Held) -> Any:
        """What is to be known of a layer's prompt, leaves `[B, ...]`; see `allot`.

        Args:
            asked: the prompt's queries.
            held: its tokens.
        """
        del asked, held
        return ()

    def allot(
        self,
        scores: Float[Array, "L B K S"],
        looks: Any,
        slots: Int[Array, "L B"],
        lengths: Int[Array, "B"],
        specs: Specs,
    ) -> Int[Array, "L B K"]:
        """Slots of each head, by what is found in layers that share; if it `surveys`.

        These are all layers that compute the same and are one loop (`kvjax.depth`), for
        they have one buffer. Slots sum to no more than those of `slots`, times `K`.

        Args:
            scores: priorities of the tokens; `-inf` cannot be kept.
            looks: what `look` returned, leaves `[L, B, ...]`.
            slots: slots per head of each layer, on average.
            lengths: row lengths.
            specs: these layers.
        """
        raise AssertionError(f"{type(self).__name__} goes by lengths alone")

    def most_of(self, slots: int, tokens: int) -> int:
        """The most slots that a head gets, on average over a layer, if it `surveys`.

        Args:
            slots: what it would get if all got the same.
            tokens: width of the prompt.
        """
        raise AssertionError(f"{type(self).__name__} goes by lengths alone")

    def fewest(self, counts: Int[Array | np.ndarray, "..."]) -> Any:
        """Slots that must do for what a score protects in every head, of `counts`."""
        return counts


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform(AbstractBudget):
    """The same number of slots in every layer and head."""

    even: ClassVar[bool] = True

    def by_layer(self, mean, lengths, specs):
        del lengths
        return same_in_all(mean, specs)


def same_in_all(mean: RowLengths, specs: Specs) -> Any:
    """The mean in every layer."""
    xp = exact.namespace(mean)
    return xp.broadcast_to(mean, (len(specs), *mean.shape))
