"""The page's section on which tokens were kept, method by method."""

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvjax.eval.report.chosen import in_full
from kvjax.eval.report.flow import (
    TOO_LONG,
    escape,
    flow,
    folded,
    legend,
    named,
    scale,
    shade,
    strip,
)
from kvjax.eval.report.kept import (
    Cell,
    by_cell,
    cells_of,
    held,
    label_of,
    pieces_of,
    question_pieces,
)

Entry = Mapping[str, Any]

MOST_BITS = 2**23
"""Heads times tokens of which a page holds every single one: 1.4 MB as text."""


def token_section(maps: Sequence[Entry]) -> str:
    """The text of one item, method by method."""
    asked = any(question_pieces(entry) for entry in maps)
    key = legend(
        scale("kept", "no head", "all heads kept it"),
        "pale letters: no head kept the token; underlined: all did",
        *(["line above: the question"] if asked else []),
        "point at a token for its number of heads, or choose a layer and a head",
    )
    full = in_full(len(pieces_of(maps[0])))
    parts = [_map(entry, n == 0, n < full) for n, entry in enumerate(maps)]
    return key + "".join(parts)


def _map(entry: Entry, first: bool, full: bool) -> str:
    pieces = pieces_of(entry)
    layers, cells = held(entry["kept"], len(pieces)), cells_of(pieces)
    heads = np.concatenate(layers)
    share = by_cell(heads.mean(axis=0), cells)
    name = f"{label_of(entry)}, {entry['task']}"
    summary = (
        f"<b>{escape(name)}</b> <span class='note'>{100 * heads.mean():.0f} % of the "
        f"slots of all heads</span>{strip(share, f'share of heads, {name}')}"
    )
    if not full:
        return folded(summary, TOO_LONG)
    start = len(pieces) - question_pieces(entry)
    titles = kept_titles(cells, layers)
    text = flow(cells, [*map(shade, share)], titles, "kept", start)
    if heads.size <= MOST_BITS:
        text = f"{CHOICE}{text}{_ALL}{data(cells, layers)}"
    return folded(summary, f'<div class="tokens">{text}</div>', open_=first)


CHOICE = (
    '<p class="choose"><label>layer <select class="layer"></select></label> '
    '<label>head <select class="head"></select></label></p>'
)
_ALL = (
    '<details class="heads"><summary>every head of every layer</summary><canvas>'
    '</canvas><p class="note">A line per head, layer 0 at the top; tokens from left to '
    "right. Click to choose a head.</p></details>"
)


def kept_titles(cells: Sequence[Cell], layers: Sequence[np.ndarray]) -> list[str]:
    """By cell, how many heads kept it, of how many layers."""
    starts = [cell.start for cell in cells]
    counts = np.stack([layer[:, starts].sum(axis=0) for layer in layers])
    total = sum(map(len, layers))
    return [
        named(
            cell,
            f"kept by {column.sum()} of {total} heads, in {np.count_nonzero(column)} "
            f"of {len(layers)} layers",
        )
        for cell, column in zip(cells, counts.T, strict=True)
    ]


def data(cells: Sequence[Cell], layers: Sequence[np.ndarray], kind: str = "") -> str:
    """Which head kept which token, a bit each, for the page's script."""
    bits = np.packbits(np.concatenate(layers), axis=-1, bitorder="little")
    held_by = {
        "heads": [len(layer) for layer in layers],
        "starts": [cell.start for cell in cells],
        "width": bits.shape[1],
        "bits": base64.b64encode(bits.tobytes()).decode(),
    }
    text = json.dumps(held_by, separators=(",", ":"))
    return f'<script type="application/json" class="bits {kind}">{text}</script>'
