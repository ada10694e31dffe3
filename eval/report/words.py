"""Figures of a text in words: below each token, cells in the colour of its numbers."""

import functools
import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection

from kvjax.eval.report.kept import Cell, cells_of, visible
from kvjax.eval.report.style import SETTINGS, NotebookFigure

MOST_TOKENS = 4096
"""Of a text that is drawn."""
MOST_BANDS = 8
"""Rows of cells below a line; more layers are averaged with their neighbours."""

_FONT, _SIZE = "DejaVu Sans Mono", 8.222
_WIDE = 11 / 160  # inches of a character: 11 dots in the PNG, so that none is rounded
_CHUNK = 24  # characters that are written at once: at other sizes widths are rounded
_HIGH, _BAND, _GAP, _LEFT = 0.16, 0.085, 0.09, 0.82

Placed = list[tuple[int, int, Cell]]


def words_figure(
    pieces: Sequence[str],
    bands: np.ndarray,
    *,
    colors: str = "Blues",
    columns: int = 100,
    title: str = "",
    labels: Sequence[str] = (),
    every_label: bool = False,
    scale: Sequence[str] = (),
) -> NotebookFigure:
    """A text, and below each of its tokens a cell per band.

    Args:
        pieces: text of each token.
        bands: `[R, S]` in [0, 1]; NaN is blank.
        colors: a color map of matplotlib.
        columns: characters per line.
        title: above the figure.
        labels: of the bands; the first and the last stand beside each line.
        every_label: all of them stand there.
        scale: what the two ends of the colors mean.

    Raises:
        ValueError: too many tokens to be seen.
    """
    _check_length(len(pieces))
    lines = lines_of(cells_of([visible(piece) for piece in pieces]), columns)
    step = _HIGH + _BAND * len(bands) + _GAP
    top, bottom = 0.42 if title else 0.12, 0.36 if scale else 0.06
    high = top + step * max(len(lines), 1) + bottom
    ends = range(len(labels)) if every_label else {0, max(0, len(labels) - 1)}
    shown = [name if row in ends else "" for row, name in enumerate(labels)]
    with rc_context({**SETTINGS, "font.family": _FONT, "font.size": _SIZE}):
        figure, axes = _sheet(columns, high, title)
        boxes = []
        for number, line in enumerate(lines):
            y = top + step * number
            _write(axes, line, y, shown)
            boxes += _boxes(line, bands, y + _HIGH)
        boxes += _scale(axes, scale, high - 0.2) if scale else []
        _fill(axes, boxes, colors)
    return figure


def _fill(axes: Axes, boxes: Sequence[tuple[float, ...]], colors: str) -> None:
    """All in one: a figure of thousands of parts takes minutes."""
    left, right, low, up, values = np.array(boxes).reshape(-1, 5).T
    corners = [(left, low), (right, low), (right, up), (left, up)]
    shapes: Any = np.stack([np.stack(one, axis=-1) for one in corners], axis=1)
    look = {"facecolors": matplotlib.colormaps[colors](values), "linewidth": 0}
    axes.add_collection(PolyCollection(shapes, **look))


def _check_length(tokens: int) -> None:
    if tokens > MOST_TOKENS:
        raise ValueError(
            f"a figure shows at most {MOST_TOKENS} tokens; got {tokens}. Take a "
            "shorter text."
        )


def _sheet(columns: int, high: float, title: str) -> tuple[NotebookFigure, Axes]:
    """An empty figure, across in characters and down in inches."""
    wide = _LEFT + _WIDE * columns + 0.1
    figure = NotebookFigure(figsize=(wide, high))
    place = (_LEFT / wide, 0, _WIDE * columns / wide, 1)
    axes = figure.add_axes(place, xlim=(0, columns), ylim=(high, 0))
    axes.set_axis_off()
    style = {"fontsize": 10, "fontweight": "bold", "parse_math": False}
    axes.text(1 - _LEFT / _WIDE, 0.24, title, family="DejaVu Sans", **style)
    return figure, axes


def _write(axes: Axes, line: Placed, y: float, labels: Sequence[str]) -> None:
    """The text of a line, and the labels of its bands."""
    for _, words in itertools.groupby(line, lambda cell: cell[0] // _CHUNK):
        some = list(words)
        text = "".join(cell.text for _, _, cell in some)
        axes.text(some[0][0], y + _HIGH - 0.045, drawable(text), parse_math=False)
    for row, name in enumerate(labels):
        if name:
            where = y + _HIGH + _BAND * (row + 0.4)
            style = {"fontsize": 6, "parse_math": False}
            axes.text(-0.8, where, name, ha="right", va="center", **style)


def _boxes(line: Placed, bands: np.ndarray, y: float) -> Iterator[tuple[float, ...]]:
    """Left, right, low, high and value of the cells below a line."""
    if not line:
        return
    starts = [cell.start for _, _, cell in line]
    own = bands[:, starts[0] : line[-1][2].stop]
    counts = [cell.stop - cell.start for _, _, cell in line]
    means = np.add.reduceat(own, np.array(starts) - starts[0], axis=1) / counts
    for row, values in enumerate(means.tolist()):
        low = y + _BAND * row
        for (start, stop, _), value in zip(line, values, strict=True):
            if value == value:
                yield start + 0.06, stop - 0.06, low, low + 0.82 * _BAND, value


def _scale(axes: Axes, scale: Sequence[str], y: float) -> list[tuple[float, ...]]:
    """The words for the ends of the colors; the steps between, as `_boxes` has them."""
    first, last = scale
    axes.text(0, y + 0.1, first, fontsize=7, parse_math=False)
    start = len(first) * 7 / _SIZE + 1
    axes.text(start + 17.9, y + 0.1, last, fontsize=7, parse_math=False)
    lefts = [start + 1.9 * n for n in range(9)]
    return [(x, x + 1.8, y, y + 0.1, n / 8) for n, x in enumerate(lefts)]


def lines_of(cells: Sequence[Cell], columns: int) -> list[Placed]:
    """Cells as lines of `columns` characters: where each starts and stops.

    A cell that is longer than a line is cut, with an ellipsis.
    """
    lines: list[Placed] = [[]]
    at = 0
    for cell in cells:
        text = cell.text or "·"
        if len(text) > columns:
            text = text[: columns - 1] + "…"
        if at + len(text) > columns:
            lines.append([])
            at = 0
        lines[-1].append((at, at + len(text), cell._replace(text=text)))
        at += len(text)
    return lines


def layer_bands(share: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """`[L, S]` as at most `MOST_BANDS` rows, neighbours averaged, and their labels."""
    groups = np.array_split(np.arange(len(share)), min(len(share), MOST_BANDS))
    ends = [(group[0], group[-1]) for group in groups]
    names = [f"{a}" if a == b else f"{a}-{b}" for a, b in ends]
    word = "layer" if "-" not in names[0] else "layers"
    names[0] = f"{word} {names[0]}"
    return np.stack([share[group].mean(axis=0) for group in groups]), names


def drawable(text: str) -> str:
    """The text with a box for each character that the font of figures lacks.

    Marks that go with the character before, and characters of double width, would
    move what follows, so they are boxes, too.
    """
    known = _known()
    return "".join(c if ord(c) in known and _plain(c) else "□" for c in text)


def _plain(c: str) -> bool:
    wide = unicodedata.east_asian_width(c) in "WF"
    return not wide and not unicodedata.combining(c)


@functools.cache
def _known() -> frozenset[int]:
    path = font_manager.findfont(_FONT)
    return frozenset(font_manager.get_font(path).get_charmap())
