"""How figures look: one palette, one set of marks, text that follows the page."""

import io
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Okabe and Ito's colours for the colour-blind; yellow is left out (too pale on white).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A5195")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
FLOOR = "#8C8C8C"
INK = "#1c2733"
"""Colour of text and axes; becomes the colour of the page's own text in the HTML."""

SETTINGS: dict[Any, Any] = {
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#9aa5b1",
    "grid.alpha": 0.28,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.7,
    "lines.markersize": 5,
    "xtick.direction": "out",
    "ytick.direction": "out",
    "svg.fonttype": "path",
    **{
        name: INK
        for name in ("text.color", "axes.edgecolor", "axes.labelcolor")
        + ("xtick.color", "ytick.color")
    },
}


class NotebookFigure(Figure):
    """A figure that notebooks show without pyplot and its global state."""

    def _repr_png_(self) -> bytes:
        return png(self)


def new_figure(width: float, height: float) -> NotebookFigure:
    """An empty figure in the house style, sizes in inches."""
    with rc_context(SETTINGS):
        return NotebookFigure(figsize=(width, height), layout="constrained")


def look(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each method, the same in every figure of a report."""
    drawn = [name for name in names if name not in ("none", "random")]
    out = {"none": (INK, "*"), "random": (FLOOR, "x")}
    for index, name in enumerate(drawn):
        turn = index // len(PALETTE)  # beyond seven, marker and colour pair anew
        mark = MARKERS[(index + turn) % len(MARKERS)]
        out[name] = (PALETTE[index % len(PALETTE)], mark)
    return out


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Heights as near the wanted ones as `gap` between them and the bounds allow."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    # Without gaps, the nearest increasing heights are means of runs that collide.
    runs: list[tuple[float, int]] = []
    for place, index in enumerate(order):
        total, count = wanted[index] - gap * place, 1
        while runs and runs[-1][0] / runs[-1][1] >= total / count:
            earlier, more = runs.pop()
            total, count = total + earlier, count + more
        runs.append((total, count))
    flat = [total / count for total, count in runs for _ in range(count)]
    most = high - gap * (len(wanted) - 1)
    placed = [min(max(value, low), most) + gap * i for i, value in enumerate(flat)]
    return [height for _, height in sorted(zip(order, placed, strict=True))]


def png(figure: Figure) -> bytes:
    """The figure on white."""
    buffer = io.BytesIO()
    with rc_context(SETTINGS):
        figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()


def svg(figure: Figure, salt: str, title: str) -> str:
    """The figure as an inline SVG element: transparent, text in the page's colour."""
    buffer = io.StringIO()
    with rc_context({**SETTINGS, "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # HTML knows these names; without them the page holds no address at all.
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    # As wide as its place, but never so wide that its text outgrows the page's.
    most = f' style="max-width:{1.4 * 72 * figure.get_figwidth():.0f}px"'
    text = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', rf"\1{most}", text, count=1)
    text = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", text, count=1)
    # Ids are per document: figures must not share the ones matplotlib numbers.
    text = re.sub(r'\sid="(?:figure|axes|patch|line2d|text|matplotlib)[^"]*"', "", text)
    text = text.replace(INK, "currentColor")
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def save_svg(figure: Figure, path: pathlib.Path) -> None:
    """Lay a figure out and write it: the same bytes from the same numbers."""
    FigureCanvasSVG(figure)  # texts are as wide as this backend finds them
    figure.tight_layout()
    with rc_context({"svg.hashsalt": "kvjax"}):
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
