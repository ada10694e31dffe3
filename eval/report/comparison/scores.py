"""Tables of accuracies: of compressions side by side, of models side by side."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from kvjax.eval.report.comparison.markdown import markdown_table
from kvjax.eval.report.comparison.measured import CellKey, Measured, ModelScores
from kvjax.eval.report.numbers import mean_known, percent

SEEDS = ("", "-seed1")
"""What the names of evaluations end on, by seed; columns name those of the first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a page: one compression of one evaluation."""

    title: str
    evaluation: str
    compression: str
    keep: float | None = None

    @property
    def label(self) -> str:
        """What it has in common with the columns of other budgets."""
        budget = "" if self.keep is None else f", {self.keep:g}"
        return self.title.replace(budget, "", 1)


def columns_at(
    evaluation: str, *names: str, keeps: Sequence[float], after: str = ""
) -> tuple[Column, ...]:
    """Compressions at several budgets each; titles end on `after`."""
    return tuple(
        Column(
            title=f"{name}, {keep:g}{after}",
            evaluation=evaluation,
            compression=name,
            keep=keep,
        )
        for name in names
        for keep in keeps
    )


def full_column(evaluation: str, after: str = "") -> Column:
    """Of the cache that nothing is done to."""
    return Column(title=f"full{after}", evaluation=evaluation, compression="none")


def plain_column(evaluation: str, name: str) -> Column:
    """Of a compression that has no budget."""
    return Column(title=name, evaluation=evaluation, compression=name)


def score_tables(
    columns: Sequence[Column], evaluations: Mapping[str, Measured]
) -> list[str]:
    """A table per seed; what was not measured is left out."""
    lines = []
    for seed, after in enumerate(SEEDS):
        own = [
            dataclasses.replace(column, evaluation=name)
            for column in columns
            if (name := f"{column.evaluation}{after}") in evaluations
        ]
        if own:
            table = _score_table(own, evaluations)
            lines += ["", f"## Seed {seed}", "", *table]
    return lines


def _score_table(
    columns: Sequence[Column], evaluations: Mapping[str, Measured]
) -> list[str]:
    """Accuracies in percent, their mean, and the bytes of the cache."""
    first = evaluations[columns[0].evaluation]
    groups = list(dict.fromkeys(cell[:2] for cell in first.scores))

    def each(cells: Mapping[CellKey, float | None], column: Column):
        return [cells.get((*g, column.compression, column.keep)) for g in groups]

    of = [evaluations[column.evaluation] for column in columns]
    scores = [each(one.scores, c) for one, c in zip(of, columns, strict=True)]
    sizes = [mean_known(each(one.bytes, c)) for one, c in zip(of, columns, strict=True)]
    rows = [
        [task, visibility, *(percent(column[at]) for column in scores)]
        for at, (task, visibility) in enumerate(groups)
    ]
    rows.append(["mean", "", *(percent(mean_known(column)) for column in scores)])
    kib = ["" if size is None else f"{size / 1024:.0f}" for size in sizes]
    rows.append(["KiB per prompt", "", *kib])
    heads = ["task", "visibility", *(column.title for column in columns)]
    return markdown_table(heads, "ll" + "r" * len(columns), rows)


def full_table(models: ModelScores, titles: Sequence[str]) -> list[str]:
    """What models reach with the whole cache, question hidden, task by task."""
    tasks = dict.fromkeys(cell[0] for cells in models.values() for cell in cells)
    rows = []
    for task in tasks:
        cell = (task, "query_agnostic", "none", None)
        rows.append([task, *(percent(cells.get(cell)) for cells in models.values())])
    return markdown_table(["task", *titles], "l" + "r" * len(titles), rows)


def perplexity_table(losses: ModelScores, titles: Sequence[str]) -> list[str]:
    """Perplexities of texts, by what is done to the cache of what is in front."""
    every = dict.fromkeys(cell for cells in losses.values() for cell in cells)
    rows = []
    for cell in sorted(every, key=lambda one: (one[0], one[2], -(one[3] or 0.0))):
        keep = "" if cell[3] is None else f"{cell[3]:g}"
        found = (cells.get(cell) for cells in losses.values())
        values = ["" if x is None else f"{math.exp(x):.2f}" for x in found]
        rows.append([cell[0], cell[2], keep, *values])
    heads = ["text", "compression", "keep", *titles]
    return markdown_table(heads, "llr" + "r" * len(titles), rows)


def bound_table(
    models: ModelScores,
    titles: Sequence[str],
    bounds: Mapping[float, float],
    task: str,
    compression: str,
) -> list[str]:
    """What models reach of what can be known, question hidden, budget by budget."""
    rows = []
    for keep, bound in bounds.items():
        cell = (task, "query_agnostic", compression, keep)
        values = [bound, *(cells.get(cell) for cells in models.values())]
        rows.append([f"{keep:g}", *map(percent, values)])
    return markdown_table(["keep", "bound", *titles], "rr" + "r" * len(titles), rows)


def cells_table(models: ModelScores, titles: Sequence[str]) -> list[str]:
    """All cells of all models."""
    every = dict.fromkeys(cell for cells in models.values() for cell in cells)
    rows = []
    for cell in sorted(every, key=lambda one: (*one[:3], one[3] or 0.0)):
        keep = "" if cell[3] is None else f"{cell[3]:g}"
        values = [percent(cells.get(cell)) for cells in models.values()]
        rows.append([*cell[:3], keep, *values])
    heads = ["task", "visibility", "compression", "keep", *titles]
    return markdown_table(heads, "lllr" + "r" * len(titles), rows)
