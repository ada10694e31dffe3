"""Draw what each kernel reads: `python tools/kernel_figures.py`.

Writes docs/kernels/figures/<op>.svg by hand, without a plotting library, so that the
files are small and the same everywhere. A test keeps them current.
"""

import pathlib
import random
from collections.abc import Callable
from types import MappingProxyType

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "docs/kernels/figures"
READ, SIDE, OUT, IDLE, NONE = "#2f6fb2", "#e3a13b", "#3f9a6b", "#e3e6ea", "none"
EDGE, INK = "#9aa3ad", "#333c46"
STYLE = f'font-family="sans-serif" font-size="12" fill="{INK}"'
LEGEND = ((READ, "read"), (SIDE, "read: tables, scales"), (OUT, "written"))


class Drawing:
    """Shapes in order, and the size they need."""

    def __init__(self) -> None:
        self.shapes: list[str] = []
        self.width = self.height = 0.0
        self.idle = "neither read nor computed"

    def box(self, x, y, w, h, fill=IDLE, edge=EDGE) -> None:
        """A rectangle."""
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" '
            f'fill="{fill}" stroke="{edge}" stroke-width="0.7"/>'
        )
        self.width, self.height = max(self.width, x + w), max(self.height, y + h)

    def text(self, x, y, words, anchor="start") -> None:
        """A line of words, `y` at its baseline."""
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" {STYLE}>{words}</text>'
        )
        right = x + 6.6 * len(words) if anchor == "start" else x
        self.width, self.height = max(self.width, right), max(self.height, y + 3)

    def arrow(self, x, y, length) -> None:
        """To the right."""
        tip = x + length
        self.shapes.append(
            f'<path d="M{x:g} {y:g}H{tip:g}m-5 -4l5 4l-5 4" fill="none" '
            f'stroke="{INK}"/>'
        )

    def grid(self, x, y, rows, columns, paint, cell=12, tall=None) -> None:
        """Cells coloured by `paint(row, column)`; None leaves one out."""
        tall = tall or cell
        for row in range(rows):
            for column in range(columns):
                fill = paint(row, column)
                if fill is not None:
                    self.box(x + column * cell, y + row * tall, cell, tall, fill)

    def svg(self) -> str:
        """The file, with the legend below."""
        y, x = self.height + 16, 10.0
        for fill, words in (*LEGEND, (IDLE, self.idle)):
            self.box(x, y, 10, 10, fill)
            self.text(x + 15, y + 9, words)
            x += 30 + 6.6 * len(words)
        w, h = self.width + 10, self.height + 10
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w:g} {h:g}" '
                f'width="{w:g}" height="{h:g}">',
                f'<rect width="{w:g}" height="{h:g}" fill="#ffffff"/>',
                *self.shapes,
                "</svg>\n",
            ]
        )


def decode_attention() -> Drawing:
    """Heads with lengths of their own."""
    d, lengths = Drawing(), (20, 7, 13, 0)
    d.text(120, 20, "slots, in blocks")
    for head, length in enumerate(lengths):
        y = 30 + 24 * head
        d.text(10, y + 12, f"KV head {head}")
        d.box(80, y, 14, 16, SIDE)
        d.grid(120, y, 1, 24, lambda _, j, n=length: READ if j < n else IDLE, tall=16)
        d.arrow(418, y + 8, 26)
        d.box(452, y, 30, 16, OUT)
    d.text(62, 20, "length")
    d.text(446, 20, "out, lse")
    return d


def paged_decode() -> Drawing:
    """Pages of a pool that a list names."""
    d, chosen = Drawing(), {1, 4, 5, 11, 14}
    d.text(10, 20, "selected pages of one KV head")
    for i, page in enumerate(sorted(chosen)):
        d.box(10 + 30 * i, 30, 26, 16, SIDE)
        d.text(23 + 30 * i, 42, str(page), "middle")
    d.text(10, 72, "pool: a page holds P slots of one head")
    for page in range(16):
        paint = READ if page in chosen else IDLE
        d.grid(10 + 27 * page, 82, 4, 2, lambda *_, p=paint: p, cell=11)
        d.text(21 + 27 * page, 140, str(page), "middle")
    d.arrow(448, 104, 26)
    d.box(482, 96, 30, 16, OUT)
    d.text(476, 86, "out, lse")
    return d


def sparse_prefill() -> Drawing:
    """Listed blocks of a causal grid."""
    d, draw, n = Drawing(), random.Random(1), 16

    def listed(row, column):
        if column > row:
            return None
        near, sink = row - column < 2, column == 0
        return READ if near or sink or draw.random() < 0.12 else IDLE

    d.text(80, 20, "KV blocks")
    d.text(10, 130, "query")
    d.text(10, 144, "blocks")
    d.grid(60, 30, n, n, listed)
    d.grid(280, 30, n, 4, lambda *_: SIDE)
    d.text(270, 20, "lists")
    d.arrow(340, 126, 26)
    d.grid(380, 30, n, 1, lambda *_: OUT, cell=30, tall=12)
    d.text(372, 20, "out, lse")
    return d


def column_stats() -> Drawing:
    """The rows of a window, summed by column."""
    d, n, window = Drawing(), 20, 4
    d.text(90, 20, "keys")
    d.text(10, 120, "queries")

    def paint(row, column):
        if column > row:
            return None
        return READ if row >= n - window else IDLE

    d.grid(70, 30, n, n, paint, cell=10)
    d.text(282, 222, "the queries that vote")
    draw = random.Random(3)
    for column in range(n):
        tall = 4 + 26 * draw.random() ** 3
        d.box(70 + 10 * column, 270 - tall, 10, tall, OUT)
    d.text(282, 264, "mass per key: sum, max, slash")
    return d


def block_score() -> Drawing:
    """Antidiagonals or means of tiles."""
    d, tiles, size = Drawing(), 4, 4
    d.text(60, 20, "mode antidiag: every s-th pair")

    def antidiagonal(row, column):
        if column // size > row // size:
            return None
        return READ if (row + column) % size == size - 1 else IDLE

    d.grid(60, 30, tiles * size, tiles * size, antidiagonal)
    for i in range(tiles):
        for j in range(i + 1):
            d.box(60 + 48 * j, 30 + 48 * i, 48, 48, NONE, INK)
    d.text(10, 130, "queries")
    d.arrow(266, 126, 26)
    d.text(310, 66, "mass per block")
    d.grid(310, 76, 4, 4, lambda i, j: OUT if j <= i else None, cell=24)
    return d


def page_summary() -> Drawing:
    """Pages of keys and their extremes."""
    d = Drawing()
    d.idle = "dead slot: does not count"
    d.text(10, 20, "live keys, a page of slots at a time")
    for page in range(4):
        dead = 6 if page < 3 else 3
        x = 10 + 92 * page
        d.grid(x, 30, 6, 8, lambda i, j, n=dead: READ if i < n else IDLE, cell=10)
        for row, name in enumerate(("low", "high", "mean")):
            d.grid(x, 110 + 16 * row, 1, 8, lambda *_: OUT, cell=10)
            if page == 3:
                d.text(x + 88, 119 + 16 * row, name)
    return d


def page_score() -> Drawing:
    """Bounds of pages against a query."""
    d, draw = Drawing(), random.Random(5)
    d.text(10, 20, "summaries of pages: low, high (bound) or one vector (dot)")
    for page in range(14):
        x = 10 + 30 * page
        d.grid(x, 30, 1, 2, lambda *_: READ, cell=11, tall=48)
        tall = 6 + 40 * draw.random() ** 2
        d.box(x, 160 - tall, 22, tall, OUT)
    d.text(10, 100, "query heads of the group, combined")
    d.text(438, 156, "score per page")
    d.box(438, 30, 14, 48, READ)
    d.text(458, 58, "q")
    return d


def quantize_pack() -> Drawing:
    """Groups along channels or slots, and their codes."""
    d = Drawing()
    for x, name, w, h in ((10, "channel", 12, 48), (310, "token", 48, 12)):
        d.text(x, 20, f"axis {name}: one group outlined")
        d.grid(x, 30, 8, 8, lambda *_: READ)
        d.box(
            x + (36 if w == 12 else 0), 30 + (0 if w == 12 else 36), w, h, NONE, "#000"
        )
        d.arrow(x + 106, 78, 24)
        d.grid(x + 140, 30, 8, 4, lambda *_: OUT, cell=12)
        rows, columns = (2, 8) if w == 12 else (8, 2)
        d.grid(x + 200, 30, rows, columns, lambda *_: OUT, cell=8, tall=12)
        d.text(x + 140, 142, "codes")
        d.text(x + 200, 142, "scale, zero")
    return d


FIGURES: MappingProxyType[str, Callable[[], Drawing]] = MappingProxyType(
    {
        draw.__name__: draw
        for draw in (
            block_score,
            column_stats,
            decode_attention,
            page_score,
            page_summary,
            paged_decode,
            quantize_pack,
            sparse_prefill,
        )
    }
)


if __name__ == "__main__":
    for name, draw in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")
