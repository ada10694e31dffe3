"""Figures of comparisons: accuracy against what is kept, and against bytes.

In matplotlib's own style, which published pages are drawn in; `save_svg` writes them.
"""

import statistics
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvjax.eval.report.comparison.measured import CellKey, Measured, ModelScores
from kvjax.eval.report.comparison.scores import SEEDS, Column
from kvjax.eval.report.numbers import mean_known

DASHES: Mapping[str, str] = dict(zip(SEEDS, ("-", "--"), strict=True))
"""Of the lines of each seed."""
LEGEND = {"frameon": False, "fontsize": 8}

Points = Sequence[tuple[float, float]]


def kept_figure(
    models: ModelScores, names: Sequence[str], methods: Sequence[str]
) -> Figure:
    """Accuracy against the kept fraction: a panel per method, a line per model.

    Args:
        models: accuracies per model; of names ending on one of `SEEDS`.
        names: models to draw, of the first seed; those that are not there are left
            out.
        methods: compressions.
    """
    figure = Figure(figsize=(2.3 * len(methods), 4.4))
    axes = figure.subplots(2, len(methods), sharex=True, sharey=True, squeeze=False)
    arms = {"query_agnostic": "question hidden", "query_aware": "question seen"}
    for row, (visibility, label) in enumerate(arms.items()):
        for panel, method in zip(axes[row], methods, strict=True):
            for index, name in enumerate(names):
                for after in SEEDS:
                    if cells := models.get(f"{name}{after}"):
                        points = curve(cells, visibility, method)
                        _line(panel, points, index, name, after)
            panel.set_xscale("log", base=2)
            panel.set_xticks([1, 0.25, 0.125], ["1", "1/4", "1/8"])
            panel.set_title(method if row == 0 else "", fontsize=9)
        axes[row][0].set_ylabel(label)
    figure.supxlabel("fraction of the cache kept", fontsize=9)
    handles, labels = axes[0][0].get_legend_handles_labels()
    under = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "ncols": len(labels)}
    figure.legend(handles, labels, **under, **LEGEND)
    figure.suptitle("Mean accuracy over tasks (percent)", fontsize=10)
    return figure


def curve(cells: Mapping[CellKey, float], visibility: str, method: str) -> Points:
    """Kept fractions and mean accuracies in percent, the full cache first."""
    values: dict[float, list[float]] = {}
    for (_, arm, name, keep), value in cells.items():
        if arm == visibility and name in (method, "none"):
            values.setdefault(1.0 if keep is None else keep, []).append(100 * value)
    return [(keep, statistics.fmean(values[keep])) for keep in sorted(values)[::-1]]


def bytes_figure(
    columns: Sequence[Column], evaluations: Mapping[str, Measured]
) -> Figure:
    """Mean accuracy over all cells against bytes, a line per method of a page."""
    figure = Figure(figsize=(5.6, 3.4))
    axes = figure.subplots()
    for index, (label, own) in enumerate(series(columns).items()):
        for after in SEEDS:
            found = [_point(evaluations, column, after) for column in own]
            points = sorted(point for point in found if point is not None)
            if points:
                _line(axes, points, index, label, after)
    axes.set_xlabel("KiB of cache per prompt", fontsize=9)
    axes.set_ylabel("mean accuracy (percent)", fontsize=9)
    axes.set_xlim(left=0)
    axes.set_ylim(-3, 103)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), **LEGEND)
    return figure


def series(columns: Sequence[Column]) -> dict[str, list[Column]]:
    """Columns by what is the same but for the budget."""
    out: dict[str, list[Column]] = {}
    for column in columns:
        out.setdefault(column.label, []).append(column)
    return out


def _point(
    evaluations: Mapping[str, Measured], column: Column, after: str
) -> tuple[float, float] | None:
    """KiB and percent, both means over tasks; None where one was not measured."""
    one = evaluations.get(f"{column.evaluation}{after}")
    if one is None:
        return None
    cells = [c for c in one.scores if c[2:] == (column.compression, column.keep)]
    size = mean_known([one.bytes.get(cell) for cell in cells])
    if size is None:
        return None
    return size / 1024, 100 * statistics.fmean(one.scores[cell] for cell in cells)


def _line(axes: Axes, points: Points, index: int, name: str, after: str) -> None:
    """What `name` reaches with one seed, in the name's color."""
    axes.plot(
        *zip(*points, strict=True),
        DASHES[after],
        color=f"C{index}",
        marker="o",
        markersize=3,
        label=f"{name}, seed 1" if after else name,
    )
