"""`Compression`: one declarative record, the same in training and evaluation."""

import dataclasses
from typing import Any, Self

from kvjax.budgets import AbstractBudget, Uniform
from kvjax.codecs import AbstractCodec, Affine, LowRank, Plain, Projected
from kvjax.prefills import AbstractPrefill, Dense
from kvjax.reads import AbstractRead, All, Quest
from kvjax.schedules import AbstractSchedule, AfterPrefill, EveryTokens
from kvjax.scorers import AbstractScorer, StreamingLLM
from kvjax.units import AbstractUnit, Token

RANKED = LowRank | Projected
"""Codecs that hold fewer numbers per slot, of slots that all heads have."""

VISIBILITIES = ("query_agnostic", "query_aware")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eviction:
    """Which tokens are dropped.

    Attributes:
        score: how valuable a token is, per KV head.
        unit: what is kept or dropped as one.
        budget: who gets how many slots.
        values: a smaller budget for values, or None for the same as keys. A token
            that keeps only its key counts in the softmax, with the mean of the
            dropped values as its value.
    """

    score: AbstractScorer
    unit: AbstractUnit = Token()
    budget: AbstractBudget
    values: AbstractBudget | None = None

    def __post_init__(self):
        if self.budget.needs_gates and not isinstance(self.unit, Token):
            raise ValueError(
                f"{type(self.budget).__name__} keeps all tokens in some heads, which "
                f"whole chunks of one size for all do not; got "
                f"evict.unit={type(self.unit).__name__}. Use single tokens."
            )
        if self.values is None:
            return
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Storage:
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
    residual: int = 0

    def __post_init__(self):
        if not isinstance(self.residual, int) or self.residual < 0:
            raise ValueError(
                f"`residual` must be an integer >= 0; got {self.residual!r}."
            )
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compression:
    """What is done to a KV cache, from prefill to the last token.

    Attributes:
        prefill: which blocks prefill attention computes.
        evict: which tokens are dropped, or None.
        store: in what form the rest is held.
        read: what a decode step looks at.
        schedule: when eviction happens.
        visibility: whether scores may see the question; where the compression point
            lies in an evaluation (`query_agnostic`: between context and question).
    """

    prefill: AbstractPrefill = Dense()
    evict: Eviction | None = None
    store: Storage = Storage()
    read: AbstractRead = All()
    schedule: AbstractSchedule = AfterPrefill()
    visibility: str = "query_agnostic"

    def __post_init__(self):
        if self.visibility not in VISIBILITIES:
            raise ValueError(
                f"`visibility` must be one of {list(VISIBILITIES)}; got "
                f"{self.visibility!r}."
            )
        self._check_schedule()
        self._check_layouts()

    def _check_schedule(self):
        if not isinstance(self.schedule, EveryTokens):
            return
        if self.evict is None:
            raise ValueError(
                "schedule every_tokens evicts while decoding, but `evict` is not set."
            )
        plain = isinstance(self.store.keys, Plain) and isinstance(
            self.store.values, Plain
        )
        simple = isinstance(self.evict.unit, Token) and self.evict.values is None
        if not plain or not simple or self.evict.budget.per_head:
            raise ValueError(
                "schedule every_tokens works on single tokens in plain storage with "
                "the same slots in every head; use after_prefill for chunks, codecs, "
                "head-wise budgets or separate value budgets."
            )
        if isinstance(self.read, Quest):
            raise ValueError(
                "schedule every_tokens and read quest exclude each other: pages are "
                "summaries of tokens that stay."
            )
        self.evict.score.tracker(self.schedule.interval)  # raises if it has none

    def _check_layouts(self):
        headwise = self.evict is not None and self.evict.budget.per_head
        split = self.evict is not None and self.evict.values is not None
        low_rank = any(
            isinstance(codec, RANKED) for codec in (self.store.keys, self.store.values)
        )
        if headwise and (low_rank or self.store.residual or self._pages()):
            raise ValueError(
                "head-wise budgets use one flat buffer per layer, which low-rank "
                "storage, residuals and page reads do not support. Use a uniform or "
                "pyramid budget."
            )
        if split and (self.store.residual or self._pages() or low_rank):
            raise ValueError(
                "a separate budget for values excludes residuals, low-rank storage "
                "and page reads."
            )
        if self._pages():
            self._check_pages()

    def _pages(self) -> bool:
        return isinstance(self.read, Quest)

    def _check_pages(self):
        assert isinstance(self.read, Quest)
        for name in ("keys", "values"):
            codec: AbstractCodec = getattr(self.store, name)
            if not codec.appendable or self.read.page % codec.append_multiple:
                raise ValueError(
                    f"pages of {self.read.page} slots must be decodable by themselves; "
                    f"store.{name} groups {codec.append_multiple} slots or encodes the "
                    "whole prompt. Use larger pages or another codec."
                )
        if self.store.residual % self.read.page:
            raise ValueError(
                f"`residual`={self.store.residual} must be a multiple of the page size "
                f"{self.read.page}."
            )

    def block(self, layer: int) -> int:
        """Tokens that move into the body as one block in a layer; 0 for none."""
        if self.store.residual:
            return self.store.residual
        return self.read.page_of(layer) or 0

    @property
    def keep(self) -> float | None:
        """The fraction that `with_keep` sets, or None if there is no such knob."""
        if self.evict is not None:
            return self.evict.budget.keep
        if isinstance(self.read, Quest):
            return self.read.keep
        if isinstance(self.store.keys, RANKED):
            return self.store.keys.keep
        return None

    @property
    def has_budget(self) -> bool:
        """Whether `with_keep` changes anything."""
        return (
            self.evict is not None
            or isinstance(self.read, Quest)
            or isinstance(self.store.keys, RANKED)
        )

    def with_keep(self, keep: float) -> Self:
        """The same method at another budget: kept tokens, read tokens, or rank.

        What values have of their own, budget or rank, scales along, so that its share
        of the keys' stays.
        """
        if self.evict is not None:
            old, values = self.evict.budget, self.evict.values
            if values is not None:
                share = 0.5
                if values.keep is not None and old.keep is not None:
                    share = values.keep / old.keep
                values = _budget_at(values, keep * share)
            evict = dataclasses.replace(
                self.evict, budget=_budget_at(old, keep), values=values
            )
            return dataclasses.replace(self, evict=evict)
        if isinstance(self.read, Quest):
            read = dataclasses.replace(self.read, keep=keep, slots=None)
            return dataclasses.replace(self, read=read)
        if isinstance(self.store.keys, RANKED):
            keys, values = self.store.keys, self.store.values
            fields: dict[str, Any] = {"keys": dataclasses.replace(keys, keep=keep)}
            if isinstance(values, RANKED):
                other = min(1.0, values.keep * keep / keys.keep)
                fields["values"] = dataclasses.replace(values, keep=other)
            store = dataclasses.replace(self.store, **fields)
            return dataclasses.replace(self, store=store)
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
            name: dataclasses.replace(codec, bits=bits)
            for name, codec in sides.items()
            if isinstance(codec, Affine)
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


def _budget_at(budget: AbstractBudget, keep: float) -> AbstractBudget:
    return dataclasses.replace(budget, keep=keep, slots=None, bytes=None)


def recency(window: int) -> Eviction:
    """What a sliding-window layer may drop without changing anything."""
    return Eviction(score=StreamingLLM(n_sink=0), budget=Uniform(slots=window))
