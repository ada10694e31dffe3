"""Which tokens are dropped, and what becomes of them."""

import dataclasses
from typing import Self

from kvjax.budgets import AbstractBudget, Uniform
from kvjax.fields import Checked
from kvjax.merges import AbstractMerge
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


def undivided(evict: Eviction) -> str:
    """What of an eviction needs a whole prompt, in words; empty: nothing does."""
    unit, score = evict.unit, evict.score
    if evict.budget.surveys:
        return (
            f"evict.budget={type(evict.budget).__name__} compares all layers once it "
            "has seen it whole: use one that goes by lengths, or by a layer's scores"
        )
    if not unit.single or unit.reuse > 1:
        return (
            f"evict.unit={type(unit).__name__} with reuse={unit.reuse} keeps what "
            "belongs together of all of it: use token, with reuse 1"
        )
    if evict.values is not None:
        return "evict.values drops values of it alone: leave it out"
    if score.probes:
        return (
            f"evict.score={type(score).__name__} reads it again: use a score of "
            "tokens as they come"
        )
    return ""


def recency(window: int) -> Eviction:
    """What a sliding-window layer may drop without changing anything."""
    return Eviction(score=StreamingLLM(n_sink=0), budget=Uniform(slots=window))
