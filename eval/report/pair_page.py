"""The page's section on two methods side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvjax.eval.report.flow import (
    escape,
    flow,
    folded,
    legend,
    named,
    shade,
    share_bar,
)
from kvjax.eval.report.kept import (
    Cell,
    by_cell,
    cells_of,
    held,
    label_of,
    level,
    pieces_of,
    question_pieces,
)
from kvjax.eval.report.pairs import Overlap, overlap
from kvjax.eval.report.token_page import CHOICE, data, kept_titles

Entry = Mapping[str, Any]


def pair_section(pairs: Sequence[tuple[Entry, Entry]]) -> str:
    """Each pair: its difference, then both side by side, then layer by layer."""
    return "".join(_pair(*pair, open_=n == 0) for n, pair in enumerate(pairs))


def _pair(first: Entry, second: Entry, *, open_: bool) -> str:
    pieces = pieces_of(first)
    cells, start = cells_of(pieces), len(pieces) - question_pieces(first)
    sides = [held(entry["kept"], len(pieces)) for entry in (first, second)]
    found, names = overlap(*sides), [e["compression"] for e in (first, second)]
    key = legend(
        f'<span><b class="flow pair"><i class="a8 b0">line above</i></b>: '
        f"{escape(names[0])}</span>",
        f'<span><b class="flow pair"><i class="a0 b8">line below</i></b>: '
        f"{escape(names[1])}</span>",
        "the stronger, the more heads kept it; pale letters: no head of either",
    )
    body = (
        f'{key}<div class="tokens">{CHOICE}{_difference(cells, sides, start)}'
        f"{data(cells, sides[0])}{data(cells, sides[1], 'second')}</div>"
        f'<div class="sides">{_side(names[0], cells, sides[0], start)}'
        f"{_side(names[1], cells, sides[1], start)}</div>"
        f"{folded('layer by layer, in numbers', _table(found, names))}"
    )
    share = 100 * float(found.all.jaccard)
    summary = (
        f"<b>{escape(names[0])} and {escape(label_of(second))}, "
        f"{escape(first['task'])}</b> "
        f"<span class='note'>{share:.0f} % of the slots that either kept, both kept; "
        f"by layer {100 * found.jaccard.min():.0f} to {100 * found.jaccard.max():.0f} %"
        "</span>"
    )
    return folded(summary, body, open_=open_)


def _difference(cells: Sequence[Cell], sides: Sequence[list], start: int) -> str:
    one, other = (np.concatenate(side) for side in sides)
    shares = [by_cell(side.mean(axis=0), cells) for side in (one, other)]
    looks = [
        f"a{level(a)} b{level(b)}{' none' if not a + b else ''}"
        for a, b in zip(*shares, strict=True)
    ]
    starts = [cell.start for cell in cells]
    kinds = (one & other, one & ~other, other & ~one, ~(one | other))
    counts = [kind[:, starts].sum(axis=0) for kind in kinds]
    titles = [
        named(
            cell, f"both {both}, only above {a}, only below {b}, neither {none} heads"
        )
        for cell, both, a, b, none in zip(cells, *counts, strict=True)
    ]
    return flow(cells, looks, titles, "pair", start)


def _side(name: str, cells: Sequence[Cell], layers: list, start: int) -> str:
    share = by_cell(np.concatenate(layers).mean(axis=0), cells)
    looks, titles = [*map(shade, share)], kept_titles(cells, layers)
    return (
        f"<div><h4>{escape(name)}</h4>{flow(cells, looks, titles, 'kept', start)}</div>"
    )


def _table(found: Overlap, names: Sequence[str]) -> str:
    heads = ["layer", "both", f"only {names[0]}", f"only {names[1]}", "neither"]
    heads += ["overlap (Jaccard)", "both, only one, only the other"]
    lines = [_line("all", found.all)]
    for layer in range(len(found.both)):
        own = Overlap(**{name: value[layer] for name, value in vars(found).items()})
        lines.append(_line(str(layer), own))
    top = "".join(f'<th scope="col" class="plain">{escape(h)}</th>' for h in heads)
    return (
        f'<div class="scroll"><table class="overlap"><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _line(name: str, o: Overlap) -> str:
    counts = [int(x) for x in (o.both, o.first, o.second, o.neither)]
    cells = "".join(f"<td>{count}</td>" for count in counts)
    total, x, bars = max(sum(counts), 1), 0.0, ""
    for kind, count in zip(("both", "first", "second"), counts, strict=False):
        width = 100 * count / total
        bars += f'<rect class="{kind}" x="{x:.1f}" width="{width:.1f}" height="8"/>'
        x += width
    bar = share_bar(bars)
    return (
        f'<tr><th scope="row">{name}</th>{cells}<td>{100 * float(o.jaccard):.0f} %</td>'
        f"<td>{bar}</td></tr>"
    )
