"""A text as HTML: each token in the shade of its number, which stands in its title."""

import html
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvjax.eval.report.kept import Cell, level, visible


def escape(value: Any) -> str:
    """`value` as text that is text in HTML, attributes included."""
    return html.escape(str(value), quote=True)


def flow(
    cells: Sequence[Cell],
    looks: Sequence[str],
    titles: Sequence[str],
    kind: str,
    start: int | None = None,
) -> str:
    """A text that wraps like any other.

    Args:
        cells: its tokens.
        looks: classes of each cell, see `shade`.
        titles: what pointing at a cell says.
        kind: class of the whole.
        start: position from which tokens are the question, or what was read later.
    """
    parts = []
    for cell, look, title in zip(cells, looks, titles, strict=True):
        if start is not None and cell.start >= start:
            look = f"{look} later"
        text = escape(visible(cell.text)) or "·"
        # Lines of a text are joined, so that it fills the page; paragraphs are not.
        line = "<br>" if "\n\n" in cell.text else ""
        parts.append(f'<i class="{look}" title="{escape(title)}">{text}</i>{line}')
    return f'<div class="flow {kind}">{"".join(parts)}</div>'


def shade(share: float) -> str:
    """Classes of a share: its shade; `none` and `all` have a mark besides."""
    ends = {0: " none", 8: " all"}
    return f"s{level(share)}{ends.get(level(share), '')}"


def named(cell: Cell, said: str) -> str:
    """A title: which token, and what is said about it."""
    return f"{cell.place} {cell.text!r}: {said}"


def scale(kind: str, low: str, high: str) -> str:
    """The shades between the words for their ends."""
    steps = "".join(f'<i class="s{n}">&nbsp;</i>' for n in range(9))
    return (
        f'<span>{escape(low)} <b class="flow {kind}">{steps}</b> {escape(high)}</span>'
    )


def legend(*parts: str) -> str:
    """A line of explanations, which are HTML already."""
    spans = (
        part if part.startswith("<span") else f"<span>{part}</span>" for part in parts
    )
    return f'<p class="legend">{"".join(spans)}</p>'


TOO_LONG = (
    '<p class="note">The text is long: it is written out for the first methods only. '
    "Evaluate this one alone to read it.</p>"
)

BINS = 240
"""Of a strip: a long text has several tokens in each."""


def strip(values: np.ndarray, label: str, most: float = 1.0, kind: str = "") -> str:
    """Numbers along a text as a small area, from left to right; a picture of a row."""
    count = min(len(values), BINS)
    edges = np.linspace(0, len(values), count + 1).astype(int)[:-1]
    sizes = np.diff([*edges, len(values)])
    means = np.add.reduceat(np.nan_to_num(values), edges) / sizes if count else []
    heights = [round(24 - 24 * min(float(v) / (most or 1.0), 1.0), 1) for v in means]
    path = "".join(f"H{i}V{h:g}H{i + 1}" for i, h in enumerate(heights))
    return (
        f'<svg class="strip {kind}" viewBox="0 0 {max(count, 1)} 24" role="img" '
        f'preserveAspectRatio="none" aria-label="{escape(label)}">'
        f'<path d="M0 24{path}V24Z"/></svg>'
    )


def share_bar(bars: str) -> str:
    """Rectangles of a table's cell, which is 100 wide and 8 high."""
    box = 'viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true"'
    return f"<svg {box}>{bars}</svg>"


def folded(summary: str, body: str, *, open_: bool = False, kind: str = "") -> str:
    """A part that opens by a click; both are HTML already."""
    return (
        f'<details class="part {kind}"{" open" if open_ else ""}><summary>{summary}'
        f"</summary>{body}</details>"
    )
