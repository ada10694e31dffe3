"""What is done in one layer: what is dropped, how the rest is held, what is read."""

import dataclasses
import math
from typing import Annotated, Self

from kvjax.budgets import AbstractBudget, Uniform
from kvjax.codecs import AbstractCodec, Plain
from kvjax.config import sized
from kvjax.fields import Checked, Range
from kvjax.merges import AbstractMerge
from kvjax.reads import AbstractRead, All
from kvjax.schedules import AbstractSchedule, AfterPrefill
from kvjax.scorers import AbstractScorer, StreamingLLM
from kvjax.units import AbstractUnit, Token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eviction(Checked):
    """Which tokens are dropped.

    Attributes:
        score: how valuable a token is, per KV head.
        unit: what is kept or dropped as one.
        budget: who gets how many slots.
        values: a smaller budget for values, or None for the same as keys. A token
            that keeps only its key counts in the softmax, with the mean of the
            dropped values as its value.
        merge: what becomes of the dropped; None: nothing.
    """

    score: AbstractScorer
    unit: AbstractUnit = Token()
    budget: AbstractBudget
    values: AbstractBudget | None = None
    merge: AbstractMerge | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.budget.needs_gates and not self.unit.single:
            raise ValueError(
                f"{type(self.budget).__name__} keeps all tokens in some heads, which "
                f"whole chunks of one size for all do not; got "
                f"evict.unit={type(self.unit).__name__}. Use single tokens."
            )
        if self.budget.surveys and not self.unit.single:
            raise ValueError(
                f"{type(self.budget).__name__} compares scores of tokens of all "
                "layers, and chunks have ranks in their stead; got "
                f"evict.unit={type(self.unit).__name__}. Use single tokens."
            )
        if self.values is None:
            return
        if self.merge is not None:
            raise ValueError(
                "tokens that keep their key alone are not dropped: evict.values and "
                f"evict.merge exclude each other; got {type(self.merge).__name__}. "
                "Leave one of them out."
            )
        if self.budget.per_head or self.values.per_head:
            raise ValueError(
                "a separate budget for values needs the same number of slots in every "
                "head; got a head-wise budget. Use uniform or pyramid budgets."
            )
        for name in ("keep", "slots", "bytes"):
            keys, values = getattr(self.budget, name), getattr(self.values, name)
            if (keys is None) != (values is None):
                raise ValueError(
                    f"budgets of keys and values must be in the same unit; got "
                    f"{name}={keys} for keys and {values} for values."
                )
            if keys is not None and values > keys:
                raise ValueError(
                    f"values are kept only with their keys: evict.values.{name}="
                    f"{values} must not be above evict.budget.{name}={keys}."
                )

    def with_keep(self, keep: float) -> Self:
        """The same at another budget; that of values, if any, keeps its share."""
        values = self.values
        if values is not None:
            share = 0.5
            if values.keep is not None and self.budget.keep is not None:
                share = values.keep / self.budget.keep
            values = values.with_keep(keep * share)
        budget = self.budget.with_keep(keep)
        return dataclasses.replace(self, budget=budget, values=values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Storage(Checked):
    """In what form keys and values are held.

    Attributes:
        keys: codec of the keys.
        values: codec of the values.
        residual: newest tokens stay plain until this many have gathered; then they
            are encoded as one block and never again. 0 encodes the prompt once and
            keeps later tokens plain.
    """

    keys: AbstractCodec = Plain()
    values: AbstractCodec = Plain()
    residual: Annotated[int, Range(0, 2**16)] = sized(0, short=32)

    def __post_init__(self):
        super().__post_init__()
        for name in ("keys", "values"):
            codec: AbstractCodec = getattr(self, name)
            if self.residual and not codec.appendable:
                raise ValueError(
                    f"store.{name}={type(codec).__name__} encodes a whole prompt and "
                    f"takes no later blocks; got residual={self.residual}. Use 0."
                )
            if self.residual % codec.append_multiple:
                raise ValueError(
                    f"`residual` must be a multiple of the {name} codec's group of "
                    f"{codec.append_multiple} tokens; got {self.residual}."
                )

    @property
    def codecs(self) -> tuple[AbstractCodec, AbstractCodec]:
        """Of keys and of values."""
        return self.keys, self.values

    @property
    def plain(self) -> bool:
        """Whether keys and values are held as they are."""
        return all(codec.plain for codec in self.codecs)

    @property
    def flat(self) -> bool:
        """Whether heads may lie in one buffer, see `AbstractCodec.flat`."""
        return all(codec.flat for codec in self.codecs)

    @property
    def multiple(self) -> int:
        """What the slots of a part must be a multiple of."""
        return math.lcm(*(codec.append_multiple for codec in self.codecs))

    def slot_bytes(self, head_dim: int, itemsize: int) -> float:
        """Bytes of one slot of one head, its position included."""
        return 4 + sum(codec.slot_bytes(head_dim, itemsize) for codec in self.codecs)

    def with_keep(self, keep: float) -> Self:
        """With another fraction of the numbers of a slot; values keep their share."""
        old = self.keys.kept
        assert old is not None
        values = self.values
        if values.kept is not None:
            values = values.with_keep(min(1.0, values.kept * keep / old))
        return dataclasses.replace(self, keys=self.keys.with_keep(keep), values=values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerPlan(Checked):
    """What is done in one layer.

    Attributes:
        evict: which tokens are dropped, or None.
        store: in what form the rest is held.
        read: what a decode step looks at.
        schedule: when eviction happens.
    """

    evict: Eviction | None = None
    store: Storage = Storage()
    read: AbstractRead = All()
    schedule: AbstractSchedule = AfterPrefill()

    def __post_init__(self):
        super().__post_init__()
        if self.evict is not None and self.evict.budget.per_head:
            if not self.store.flat or self.changes:
                raise ValueError(
                    "head-wise budgets use one flat buffer per layer, which "
                    f"{self._fixed()} do not support. Use a uniform or pyramid budget."
                )
        if self.evict is not None and self.evict.values is not None:
            if not self.store.flat or self.changes:
                raise ValueError(
                    "a separate budget for values excludes residuals, low-rank storage "
                    f"and page reads; got {self._fixed()}."
                )
        if self.schedule.interval is not None:
            self._check_bounded()
        if not self.read.whole:
            self._check_pages()

    @property
    def block(self) -> int:
        """Tokens that move into the body together; 0: later tokens stay plain."""
        return self.store.residual or self.read.block

    @property
    def changes(self) -> bool:
        """Whether the body takes up later tokens, or queries choose what they read."""
        return bool(self.block) or not self.read.whole

    def _fixed(self) -> str:
        """What keeps the heads of a layer in step, in words."""
        found = []
        if self.store.residual:
            found.append(f"residuals (store.residual={self.store.residual})")
        if not self.read.whole:
            found.append(f"page reads ({type(self.read).__name__})")
        names = (type(x).__name__ for x in self.store.codecs if not x.flat)
        found += [f"codecs of whole layers ({name})" for name in names]
        return " and ".join(found)

    def _check_pages(self) -> None:
        read, residual = self.read, self.store.residual
        for name in ("keys", "values"):
            codec: AbstractCodec = getattr(self.store, name)
            whole = bool(read.block) and not codec.appendable
            if whole or read.page % codec.append_multiple:
                raise ValueError(
                    f"pages of {read.page} slots must be decodable by themselves, and "
                    f"so must later blocks, if the body of {type(read).__name__} takes "
                    f"them; store.{name} groups {codec.append_multiple} slots or "
                    "encodes the whole prompt. Use larger pages or another codec."
                )
        if residual and not read.block:
            raise ValueError(
                f"{type(read).__name__} leaves later tokens plain; got store.residual="
                f"{residual}. Use 0."
            )
        if read.block and residual % read.block:
            raise ValueError(
                f"`residual`={residual} must be a multiple of the page size "
                f"{read.block}."
            )

    def _check_bounded(self) -> None:
        if self.evict is None:
            raise ValueError(
                "schedule every_tokens evicts while decoding, but `evict` is not set."
            )
        simple = self.evict.unit.single and self.evict.values is None
        budget = self.evict.budget
        if not self.store.plain or not simple or budget.per_head or budget.surveys:
            raise ValueError(
                "schedule every_tokens works on single tokens in plain storage with "
                "the same slots in every head; use after_prefill for chunks, codecs, "
                "head-wise budgets or separate value budgets."
            )
        if not self.read.whole:
            raise ValueError(
                f"schedule every_tokens and read {type(self.read).__name__} exclude "
                "each other: pages are summaries of tokens that stay."
            )
        if self.evict.score.probes:
            raise ValueError(
                f"{type(self.evict.score).__name__} looks at a prompt that it has as a "
                "whole; schedule every_tokens needs a score of tokens as they come."
            )


def recency(window: int) -> Eviction:
    """What a sliding-window layer may drop without changing anything."""
    return Eviction(score=StreamingLLM(n_sink=0), budget=Uniform(slots=window))
