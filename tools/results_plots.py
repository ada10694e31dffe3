"""Figures of docs/results/."""

import pathlib
import statistics
from collections.abc import Mapping

from results_pages import SEEDS, TABLES, Cell, Column, Found
from results_tolerance import EVICTION, scores_by_model

STYLES: Mapping[str, str] = dict(zip(SEEDS, ("-", "--"), strict=True))
"""Of the lines of each seed."""
WIDE = dict(frameon=False, fontsize=8)


def _pyplot():
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "kvjax"  # the same picture from the same numbers
    return plt


def plot_tolerance(found: Mapping[str, Found], path: pathlib.Path) -> None:
    """Accuracy against the kept fraction, before and after, one panel per method."""
    plt = _pyplot()
    models = scores_by_model(found)
    figure, axes = plt.subplots(
        2, len(EVICTION), figsize=(2.3 * len(EVICTION), 4.4), sharex=True, sharey=True
    )
    for row, visibility in enumerate(("query_agnostic", "query_aware")):
        for axis, method in zip(axes[row], EVICTION, strict=True):
            for index, name in enumerate(("base", "control", "tolerant")):
                for after in SEEDS:
                    if f"{name}{after}" not in models:
                        continue
                    points = curve(models[f"{name}{after}"], visibility, method)
                    _line(axis, points, index, name, after)
            axis.set_xscale("log", base=2)
            axis.set_xticks([1, 0.25, 0.125], ["1", "1/4", "1/8"])
            axis.set_title(method if row == 0 else "", fontsize=9)
        hidden = visibility == "query_agnostic"
        axes[row][0].set_ylabel("question hidden" if hidden else "question seen")
    figure.supxlabel("fraction of the cache kept", fontsize=9)
    handles, names = axes[0][0].get_legend_handles_labels()
    under = dict(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=len(names))
    figure.legend(handles, names, **under, **WIDE)
    figure.suptitle("Mean accuracy over tasks (percent)", fontsize=10)
    _save(figure, path)


def curve(
    found: Mapping[Cell, float], visibility: str, method: str
) -> tuple[list[float], list[float]]:
    """Kept fractions and mean accuracies, the full cache first."""
    points: dict[float, list[float]] = {}
    for (_, seen, name, keep), value in found.items():
        if seen == visibility and name in (method, "none"):
            points.setdefault(1.0 if keep is None else keep, []).append(100 * value)
    keeps = sorted(points, reverse=True)
    return keeps, [statistics.fmean(points[keep]) for keep in keeps]


def plot_bytes(page: str, found: Mapping[str, Found], path: pathlib.Path) -> None:
    """Mean accuracy over all cells against bytes, a line per method of a page."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(5.6, 3.4))
    lines = series(page)
    for index, (label, columns) in enumerate(lines.items()):
        for after in SEEDS:
            points = [_point(found, column, after) for column in columns]
            there = sorted(point for point in points if point is not None)
            if there:
                _line(axis, zip(*there, strict=True), index, label, after)
    axis.set_xlabel("KiB of cache per prompt", fontsize=9)
    axis.set_ylabel("mean accuracy (percent)", fontsize=9)
    axis.set_xlim(left=0)
    axis.set_ylim(-3, 103)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), **WIDE)
    _save(figure, path)


def series(page: str) -> dict[str, list[Column]]:
    """The columns of a page by what is the same but for the budget."""
    out: dict[str, list[Column]] = {}
    for column in TABLES[page].columns:
        keep = "" if column.keep is None else f", {column.keep:g}"
        out.setdefault(column.title.replace(keep, "", 1), []).append(column)
    return out


def _point(
    found: Mapping[str, Found], column: Column, after: str
) -> tuple[float, float] | None:
    """KiB and percent, both means over tasks; None where one was not measured."""
    one = found.get(f"{column.evaluation}{after}")
    if one is None:
        return None
    of = [c for c in one.scores if c[2:] == (column.compression, column.keep)]
    held = [one.bytes.get(cell) for cell in of]
    sizes = [size for size in held if size is not None]
    if not sizes:
        return None
    score = statistics.fmean(one.scores[cell] for cell in of)
    return statistics.fmean(sizes) / 1024, 100 * score


def _line(axis, points, index: int, name: str, after: str) -> None:
    """What `name` reaches with one seed: xs and ys, in the name's color."""
    axis.plot(
        *points,
        STYLES[after],
        color=f"C{index}",
        marker="o",
        markersize=3,
        label=f"{name}, seed 1" if after else name,
    )


def _save(figure, path: pathlib.Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    _pyplot().close(figure)
