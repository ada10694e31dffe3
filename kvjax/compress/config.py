"""`Compression`: one declarative record, the same in training and evaluation."""

import dataclasses
import math
from typing import Annotated, Self

from kvjax.compress.eviction import Eviction as Eviction
from kvjax.compress.plan import LayerPlan as LayerPlan
from kvjax.compress.plan import Storage as Storage
from kvjax.config import sized
from kvjax.fields import Checked, OneOf
from kvjax.prefills import AbstractPrefill, Dense
from kvjax.reads import AbstractRead, All
from kvjax.schedules import AbstractSchedule, AfterPrefill
from kvjax.scorers import AbstractScorer

VISIBILITIES = ("query_agnostic", "query_aware")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRange(Checked):
    """What is done otherwise in some layers; None: the same as elsewhere.

    Attributes:
        first: first layer, from 0; negative ones count from the end.
        stop: the layer behind the last one; None: all from `first` on.
        evict, store, read: as in `Compression`, as a whole.
    """

    first: int = 0
    stop: int | None = sized(None, short=1)
    evict: Eviction | None = None
    store: Storage | None = None
    read: AbstractRead | None = None

    def holds(self, layer: int, layers: int) -> bool:
        """Whether a layer of a model of `layers` is one of these."""
        return layer in range(layers)[self.first : self.stop]

    def over(self, plan: LayerPlan) -> LayerPlan:
        """`plan` with what is done otherwise."""
        fields = {
            name: getattr(self, name)
            for name in ("evict", "store", "read")
            if getattr(self, name) is not None
        }
        return dataclasses.replace(plan, **fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compression(Checked):
    """What is done to a KV cache, from prefill to the last token.

    Attributes:
        prefill: which blocks prefill attention computes.
        evict: which tokens are dropped, or None.
        store: in what form the rest is held.
        read: what a decode step looks at.
        schedule: when eviction happens.
        visibility: whether scores may see the question; where the compression point
            lies in an evaluation (`query_agnostic`: between context and question).
        layers: layers in which something is done otherwise; later ranges win.
    """

    prefill: AbstractPrefill = Dense()
    evict: Eviction | None = None
    store: Storage = Storage()
    read: AbstractRead = All()
    schedule: AbstractSchedule = AfterPrefill()
    visibility: Annotated[str, OneOf(*VISIBILITIES)] = "query_agnostic"
    layers: tuple[LayerRange, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        _ = self.parts  # raise where a part excludes another
        if self.schedule.chunk is not None and not self.prefill.causal:
            raise ValueError(
                "schedule every_chunk reads chunks densely; got prefill="
                f"{type(self.prefill).__name__}, whose pattern is that of a whole "
                "prompt. Use prefill=dense, or schedule after_prefill."
            )

    @property
    def _plan(self) -> LayerPlan:
        return LayerPlan(
            evict=self.evict, store=self.store, read=self.read, schedule=self.schedule
        )

    def at(self, layer: int, layers: int) -> LayerPlan:
        """What is done in a layer of a model of `layers`."""
        plan = self._plan
        for some in self.layers:
            plan = some.over(plan) if some.holds(layer, layers) else plan
        return plan

    @property
    def parts(self) -> tuple[LayerPlan, ...]:
        """What is done in any layer."""
        return (self._plan, *(some.over(self._plan) for some in self.layers))

    @property
    def scores(self) -> tuple[AbstractScorer, ...]:
        """Of any layer."""
        return tuple(part.evict.score for part in self.parts if part.evict)

    @property
    def surveys(self) -> bool:
        """Whether a layer's share depends on data of all, or a score on a probe."""
        budgets = (part.evict.budget for part in self.parts if part.evict)
        return any(budget.surveys for budget in budgets) or self.probes

    @property
    def probes(self) -> bool:
        """Whether a score runs the model over the prompt again."""
        return any(score.probes for score in self.scores)

    @property
    def chunk_multiple(self) -> int:
        """What the tokens of a chunk of a prompt must be a multiple of."""
        return math.lcm(*(part.chunk_multiple for part in self.parts))

    @property
    def keep(self) -> float | None:
        """The fraction that `with_keep` sets, or None if there is no such knob."""
        if self.evict is not None:
            return self.evict.budget.keep
        return self.store.keys.kept if self.read.whole else self.read.kept

    @property
    def has_budget(self) -> bool:
        """Whether `with_keep` changes anything."""
        read = None if self.read.whole else self.read
        fractions = self.evict, read, self.store.keys.kept
        return any(x is not None for x in fractions)

    @property
    def reads_less(self) -> bool:
        """Whether its budget is of what a step reads, and all of it is held."""
        held = self.evict, self.store.keys.kept
        return self.has_budget and all(x is None for x in held)

    def with_keep(self, keep: float) -> Self:
        """The same method at another budget: kept tokens, read tokens, or rank.

        What values have of their own, budget or rank, scales along, so that its share
        of the keys' stays. Ranges of `layers` stay as they are.
        """
        if self.evict is not None:
            return dataclasses.replace(self, evict=self.evict.with_keep(keep))
        if not self.read.whole:
            return dataclasses.replace(self, read=self.read.with_keep(keep))
        if self.store.keys.kept is not None:
            return dataclasses.replace(self, store=self.store.with_keep(keep))
        raise ValueError(
            "this compression has no token budget (nothing is evicted, retrieved or "
            f"projected); got keep={keep}. Leave `keep` out."
        )

    def with_bits(self, bits: int) -> Self:
        """The same method with codes of `bits` bits, in keys and in values.

        A side whose codec has no bits (plain keys, say) stays as it is.

        Raises:
            ValueError: neither side has bits, or a codec does not know so many.
        """
        sides = {"keys": self.store.keys, "values": self.store.values}
        coded = {
            name: codec.with_bits(bits) for name, codec in sides.items() if codec.coded
        }
        if not coded:
            held = " and ".join(type(codec).__name__ for codec in sides.values())
            raise ValueError(
                f"this compression has no codes (keys and values are {held}); got "
                f"bits={bits}. Leave `bits` out, or store them as `affine`."
            )
        store = dataclasses.replace(self.store, **coded)
        return dataclasses.replace(self, store=store)

    def _repr_pretty_(self, printer, cycle):
        from kvjax.summary import describe

        printer.text(describe(self))

    def __treescope_repr__(self, path, subtree_renderer):
        from kvjax.summary import as_treescope

        return as_treescope(self, path)
