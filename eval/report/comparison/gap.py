"""How much of what compression costs a model another one gets back."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from kvjax.eval.report.comparison.markdown import markdown_table
from kvjax.eval.report.comparison.measured import CellKey
from kvjax.eval.report.numbers import percent

GAP = 0.10
"""Cells in which compression costs the base model less say nothing of a gap closed."""

Pairs = Mapping[str, tuple[Mapping[CellKey, float], Mapping[CellKey, float]]]
"""By title, the scores of a base model and of a tuned one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """What is claimed of the cells of some compressions at one budget.

    Attributes:
        title: what tables call it.
        compressions: whose cells it is about.
        keep: their budget, or None for those without.
        bar: the share of the gap that is to be closed; NaN: no bar of its own.
    """

    title: str
    compressions: tuple[str, ...]
    keep: float | None = None
    bar: float = math.nan

    def about(self, cell: CellKey) -> bool:
        """Whether it is about a cell."""
        return cell[2] in self.compressions and cell[3] == self.keep


@dataclasses.dataclass(frozen=True, kw_only=True)
class GapClosed:
    """How much of what compression costs the base model a tuned one gets back.

    Attributes:
        share: mean over the cells with a gap of at least `GAP`; NaN without any.
        cells: how many those are.
        before, after: mean accuracy over them.
        full: of the base model without compression.
    """

    share: float
    cells: int
    before: float
    after: float
    full: float


def gap_closed(
    base: Mapping[CellKey, float], tuned: Mapping[CellKey, float], claim: Claim
) -> GapClosed:
    """The gap closed over the cells of a claim that both models have."""
    rows = []
    for cell, before in base.items():
        full = _full(base, cell)
        if cell in tuned and claim.about(cell) and full - before >= GAP:
            gained = (tuned[cell] - before) / (full - before)
            rows.append((gained, before, tuned[cell], full))
    if not rows:
        return GapClosed(share=math.nan, cells=0, before=0, after=0, full=0)
    share, before, after, full = map(statistics.fmean, zip(*rows, strict=True))
    return GapClosed(
        share=share, cells=len(rows), before=before, after=after, full=full
    )


def claims_table(claims: Sequence[Claim], pairs: Pairs) -> list[str]:
    """A row per claim that some cell is about; accuracies are those of the first pair.

    A claim without a cell in any pair is left out.
    """
    heads = [
        *("claim", "bar, %"),
        *(f"{title}: closed, %" for title in pairs),
        *("before, after, full", "cells"),
    ]
    rows = []
    for claim in claims:
        each = [gap_closed(base, tuned, claim) for base, tuned in pairs.values()]
        if not any(one.cells for one in each):
            continue
        first = each[0]
        levels = map(percent, (first.before, first.after, first.full))
        rows.append(
            [
                *(claim.title, percent(claim.bar, 0)),
                *(percent(one.share, 0) for one in each),
                *(", ".join(levels), str(first.cells)),
            ]
        )
    return markdown_table(heads, "lr" + "r" * len(pairs) + "lr", rows)


def costs_table(
    claims: Sequence[Claim], base: str, models: Mapping[str, Mapping[CellKey, float]]
) -> list[str]:
    """What compression takes from each model of what it does without.

    Over the cells of a claim in which that is at least `GAP` for the model `base`, and
    that a model has: its mean accuracy in full and compressed, and the share lost.
    """
    rows = []
    for claim in claims:
        cells = [
            cell
            for cell, score in models[base].items()
            if claim.about(cell) and _full(models[base], cell) - score >= GAP
        ]
        for title, scores in models.items():
            mine = [cell for cell in cells if cell in scores]
            mine = [cell for cell in mine if not math.isnan(_full(scores, cell))]
            if not mine:
                continue
            full = statistics.fmean(_full(scores, cell) for cell in mine)
            left = statistics.fmean(scores[cell] for cell in mine)
            lost = 1 - left / full if full else math.nan
            levels = map(percent, (full, left))
            rows.append([claim.title, title, *levels, percent(lost, 0), str(len(mine))])
    heads = ["compression", "model", "in full", "compressed", "lost, %", "cells"]
    return markdown_table(heads, "llrrrr", rows)


def _full(scores: Mapping[CellKey, float], cell: CellKey) -> float:
    """Of the same task and visibility without compression; NaN where there is none."""
    task, visibility, _, _ = cell
    return scores.get((task, visibility, "none", None), math.nan)


def methods_table(
    names: Sequence[str], known: Sequence[str], keeps: Sequence[float], pairs: Pairs
) -> list[str]:
    """The gap closed, in percent, a row per compression, at several budgets.

    Args:
        names: of the compressions.
        known: those that the tuned models were trained with.
        keeps: the budgets.
        pairs: the models.
    """
    rows = []
    for name in names:
        claims = [Claim(title=name, compressions=(name,), keep=keep) for keep in keeps]
        shares = [
            percent(gap_closed(base, tuned, claim).share, 0)
            for base, tuned in pairs.values()
            for claim in claims
        ]
        rows.append([name, "yes" if name in known else "no", *shares])
    budgets = [f"{title}, {keep:g}" for title in pairs for keep in keeps]
    heads = ["method", "trained with", *budgets]
    return markdown_table(heads, "ll" + "r" * len(budgets), rows)
