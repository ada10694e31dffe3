"""Needle in a haystack: score by depth and length, one panel per method and budget."""

from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvjax.eval.report.numbers import percent
from kvjax.eval.report.run import CellRow, group, mean
from kvjax.eval.report.style import SETTINGS, new_figure


def needle_figure(rows: Sequence[CellRow], title: str) -> Figure:
    """Heat maps of one method: depth of the needle against length, one per budget."""
    budgets = group(rows, "keep")
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    width = 1.15 + len(budgets) * (0.55 + 0.62 * len(lengths))
    figure = new_figure(max(width, 2.6), 1.25 + 0.36 * len(depths))
    with rc_context({**SETTINGS, "axes.grid": False}):
        figure.suptitle(title, fontsize=10.5, fontweight="bold", x=0.02, ha="left")
        panels = figure.subplots(1, len(budgets), squeeze=False, sharey=True)[0]
        for panel, ((keep,), same) in zip(panels, budgets.items(), strict=True):
            _panel(panel, same, lengths, depths)
            label = "all kept" if keep is None else f"keep {keep:g}"
            panel.set_title(label, fontsize=9, fontweight="normal")
        panels[0].set_ylabel("depth of the needle")
        figure.supxlabel("length in tokens", fontsize=9.5)
    return figure


def needle_words(rows: Sequence[CellRow], title: str) -> str:
    """What the figure shows, for those who cannot see it."""
    parts = []
    for key, same in group(rows, "keep", "length", "depth").items():
        keep, length, depth = key
        budget = "all kept" if keep is None else f"keep {keep:g}"
        score = percent(mean(same, "score"), 0) or "no"
        parts.append(f"{budget}, {length} tokens, depth {depth:g}: {score} %")
    return f"{title}. {'; '.join(parts)}"


def _panel(axes: Axes, rows: Sequence[CellRow], lengths: list, depths: list) -> None:
    cells = group(rows, "depth", "length")
    grid = [[mean(cells.get((d, n), ()), "score") for n in lengths] for d in depths]
    shown = [[float("nan") if v is None else v for v in line] for line in grid]
    axes.imshow(shown, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for i, line in enumerate(grid):
        for j, value in enumerate(line):
            if value is not None:
                ink = "white" if value < 0.55 else "black"
                text = percent(value, 0)
                axes.text(j, i, text, ha="center", va="center", color=ink, fontsize=8)
    axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{d:g}" for d in depths])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
