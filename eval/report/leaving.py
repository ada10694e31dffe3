"""When each token left a cache that evicts while decoding: figures, and the page's."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context

from kvjax.eval.departures import STAYED, Departures
from kvjax.eval.report.flow import (
    escape,
    flow,
    folded,
    legend,
    named,
    scale,
    shade,
    strip,
)
from kvjax.eval.report.kept import Cell, by_cell, cells_of, label_of, pieces_of
from kvjax.eval.report.style import SETTINGS, NotebookFigure, new_figure
from kvjax.eval.report.words import layer_bands, words_figure

Entry = Mapping[str, Any]


def departures_of(entry: Entry) -> tuple[Departures, list[str]]:
    """What a run's map recorded, and the text of all its tokens."""
    found, pieces = entry["departures"], pieces_of(entry)
    layers = (
        np.array([[STAYED if n is None else n for n in head] for head in layer])
        for layer in found["left"]
    )
    every = [*pieces, *found["tokens"]]
    made = Departures(
        tokens=np.arange(len(every)),
        prompt=len(pieces),
        times=tuple(found["times"]),
        left=tuple(layers),
    )
    return made, every


def lifetimes(found: Departures) -> list[np.ndarray]:
    """Per layer `[K, S]`: for which share of its time each head held each token.

    From when it was read to the end; 1 is to the end, 0 not at all.
    """
    end = found.times[-1] + 1
    born = np.maximum(np.arange(len(found.tokens)) - found.prompt + 1, 0)
    out = []
    for left in found.left:
        stayed = np.where(left == STAYED, end, left)
        out.append(np.clip((stayed - born) / (end - born), 0.0, 1.0))
    return out


def departure_map(
    found: Departures, pieces: Sequence[str], *, columns: int = 100, title: str = ""
) -> NotebookFigure:
    """A text, and below each token for how much of its time each layer held it.

    Args:
        found: of `departures`.
        pieces: text of each token, those behind the prompt included.
        columns: characters per line.
        title: above the figure.
    """
    life = np.stack([layer.mean(axis=0) for layer in lifetimes(found)])
    bands, labels = layer_bands(life)
    scale = ("dropped with the prompt", "held to the end")
    look = {"columns": columns, "title": title, "labels": labels, "scale": scale}
    return words_figure(pieces, bands, colors="YlGnBu", **look)


def departure_figure(found: Departures, *, title: str = "") -> NotebookFigure:
    """Tokens against time: the share of heads that held each; below, layer by layer.

    Args:
        found: of `departures`.
        title: above the figure.
    """
    grid = np.stack([found.held(time) for time in found.times])
    read = np.arange(grid.shape[1]) < found.prompt + np.array(found.times)[:, None]
    grid = np.where(read, grid, np.nan)
    life = np.stack([layer.mean(axis=0) for layer in lifetimes(found)])
    figure = new_figure(7.6, 4.6)
    with rc_context({**SETTINGS, "axes.grid": False}):
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        title = title.replace("$", r"\$")
        figure.suptitle(title, fontsize=10.5, fontweight="bold", x=0.01, ha="left")
        look = {"aspect": "auto", "vmin": 0, "vmax": 1, "interpolation": "nearest"}
        extent = (-0.5, grid.shape[1] - 0.5, found.times[-1] + 0.5, -0.5)
        image = above.imshow(
            _steps(grid, found.times), cmap="YlGnBu", extent=extent, **look
        )
        above.set_ylabel("tokens read since")
        below.imshow(life, cmap="YlGnBu", **look)
        below.set_ylabel("layer")
        below.set_xlabel("position in the text")
        for axes in (above, below):
            axes.axvline(found.prompt - 0.5, color="#D55E00", linewidth=1)
        style = {"fontsize": 8, "color": "#D55E00", "va": "bottom"}
        above.text(found.prompt, -0.5, " read later", **style)
        above.text(found.prompt, -0.5, "prompt ", ha="right", **style)
        for axes, words in ((above, "heads that hold it"), (below, "time held")):
            figure.colorbar(image, ax=axes, label=words, ticks=(0, 0.5, 1), pad=0.01)
    return figure


def _steps(grid: np.ndarray, times: Sequence[int]) -> np.ndarray:
    """A line for each step, also those at which nobody looked: as it was before."""
    rows = np.searchsorted(times, np.arange(times[-1] + 1), side="right") - 1
    return grid[rows]


def leaving_section(maps: Sequence[Entry], images: Sequence[str]) -> str:
    """Each map's figure, and its text with how long tokens were held."""
    key = legend(
        scale("life", "dropped with the prompt", "held to the end by all heads"),
        "pale letters: no head kept it; underlined: all heads to the end",
        "line above: read behind the prompt",
    )
    parts = []
    for entry, image in zip(maps, images, strict=True):
        found, pieces = departures_of(entry)
        cells = cells_of(pieces)
        life = by_cell(np.concatenate(lifetimes(found)).mean(axis=0), cells)
        titles = _titles(cells, found)
        text = flow(cells, [*map(shade, life)], titles, "life", found.prompt)
        name = f"{label_of(entry)}, {entry['task']}"
        about = f"{found.times[-1]} tokens read behind {found.prompt}"
        summary = (
            f"<b>{escape(name)}</b> <span class='note'>{about}</span>"
            f"{strip(life, f'share of time held, {name}', kind='life')}"
        )
        body = f'<figure class="plot wide">{image}</figure>{text}'
        parts.append(folded(summary, body, open_=not parts))
    return key + "".join(parts)


def _titles(cells: Sequence[Cell], found: Departures) -> list[str]:
    """By cell, how many heads dropped it when."""
    left, titles = np.concatenate(found.left), []
    for cell in cells:
        own = left[:, cell.start]
        later = own[own > 0]
        parts = []
        if at_once := int((own == 0).sum()):
            parts.append(f"dropped with the prompt by {at_once}")
        if later.size:
            ends = (
                f"{later.min()}"
                if later.min() == later.max()
                else (f"{later.min()} to {later.max()}")
            )
            parts.append(f"after {ends} more tokens by {later.size}")
        parts.append(
            f"held to the end by {int((own == STAYED).sum())} of {len(own)} heads"
        )
        titles.append(named(cell, ", ".join(parts)))
    return titles
