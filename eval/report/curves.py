"""Score against bytes, and time per token against bytes."""

import math
from collections.abc import Mapping, Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from kvjax.eval.report.run import CellRow, group, mean, mean_se, methods
from kvjax.eval.report.style import FLOOR, INK, SETTINGS, look, new_figure, spread
from kvjax.summary import bytes_label

Look = Mapping[str, tuple[str, str]]


def score_figure(
    rows: Sequence[CellRow], title: str, looks: Look | None = None
) -> Figure:
    """Score against resident bytes for the rows of one task and length.

    One line per method over its budgets, with one standard error; `none` is the
    ceiling, `random` the floor.
    """
    figure, axes, ends = _figure(rows, "score", title, looks)
    for line in axes.lines:
        if line.get_label() == "random":
            x, y = line.get_data(orig=False)
            axes.fill_between(x, y, color=FLOOR, alpha=0.10, linewidth=0)
    axes.set_ylabel("score")
    axes.set_ylim(-0.04, 1.08)
    _labels(axes, ends, looks or look(methods(rows)))
    return figure


def cost_figure(
    rows: Sequence[CellRow],
    column: str,
    label: str,
    title: str,
    looks: Look | None = None,
) -> Figure:
    """A column of which less is better, from zero, against resident bytes.

    Rows of one method and budget are averaged.
    """
    figure, axes, ends = _figure(rows, column, title, looks)
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    _labels(axes, ends, looks or look(methods(rows)))
    return figure


def _figure(rows: Sequence[CellRow], column: str, title: str, looks: Look | None):
    """Axes with a line per method, and where each ends."""
    figure = new_figure(5.0, 3.7)
    with rc_context(SETTINGS):
        axes = figure.add_subplot()
        axes.set_title(title.replace("$", r"\$"))
        looks = looks or look(methods(rows))
        ends = []
        for name in methods(rows):
            own = [row for row in rows if row["compression"] == name]
            if points := _points(own, column):
                ends.append((name, *_line(axes, name, points, looks[name])))
        _bytes_axis(axes, rows)
    return figure, axes, ends


def _points(rows: Sequence[CellRow], column: str) -> list[tuple[float, float, float]]:
    """`(bytes, value, standard error)` per budget, from few bytes to many."""
    points = []
    for same in group(rows, "keep").values():
        size, value = mean(same, "resident_bytes"), mean(same, column)
        if size and value is not None:
            points.append((size, value, mean_se(same, f"{column}_se")))
    return sorted(points)


def _line(axes: Axes, name: str, points, mark: tuple[str, str]) -> tuple[float, float]:
    """Draw one method; where its label is to point."""
    sizes, values, errors = zip(*points, strict=True)
    color, marker = mark
    style: dict = {"color": color, "marker": marker, "capsize": 2.5, "elinewidth": 1.0}
    if name == "none":
        axes.axhline(values[-1], color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
        style |= {"markersize": 9, "linestyle": "none"}
    elif name == "random":
        style |= {"linestyle": (0, (4, 2)), "linewidth": 1.3}
    shown = [error or math.nan for error in errors]
    bars = axes.errorbar(sizes, values, yerr=shown, **style)
    bars.lines[0].set_label(name)
    return sizes[-1], values[-1]


def _bytes_axis(axes: Axes, rows: Sequence[CellRow]) -> None:
    sizes = [row["resident_bytes"] for row in rows if row.get("resident_bytes")]
    low, high = math.log2(min(sizes)), math.log2(max(sizes))
    axes.set_xscale("log", base=2)
    axes.set_xlim(2 ** (low - 0.25), 2 ** (high + 0.25))
    step = max(1, math.ceil((high - low) / 5))
    ticks = [2.0**e for e in range(math.ceil(low - 0.25), math.floor(high + 0.25) + 1)]
    axes.xaxis.set_major_locator(FixedLocator(ticks[::-1][::step][::-1]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_label(value)))
    axes.set_xlabel("resident bytes per sequence (log2)")


def _labels(axes: Axes, ends: Sequence[tuple[str, float, float]], looks: Look) -> None:
    """Names in the right margin, in the colour of their line, led to its end."""
    inside = axes.transData + axes.transAxes.inverted()
    points = [inside.transform((x, y)) for _, x, y in ends]
    heights = spread([y for _, y in points], 0.068, 0, 0.98)
    for (name, *_), (x, y), height in zip(ends, points, heights, strict=True):
        color, marker = looks[name]
        place = {"transform": axes.transAxes, "color": color}
        lead = {"linewidth": 0.6, "alpha": 0.65, "clip_on": False, "zorder": 1}
        axes.plot((x, 1.035), (y, height), **lead, **place)
        # Beyond seven methods colours come again: the mark tells them apart.
        axes.plot(1.05, height, marker, markersize=4.5, clip_on=False, **place)
        axes.text(1.075, height, _short(name), fontsize=9, va="center", **place)


def _short(name: str) -> str:
    """A name as literal text (no math mode), cut where the margin ends."""
    text = name if len(name) <= 22 else name[:21] + "…"
    return text.replace("$", r"\$")
