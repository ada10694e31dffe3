"""KL token by token over a text: figures for notebooks, and the page's section."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.ticker import NullLocator

from kvjax.eval.report.chosen import in_full
from kvjax.eval.report.flow import TOO_LONG, escape, flow, folded, legend, named, strip
from kvjax.eval.report.kept import cells_of, label_of
from kvjax.eval.report.style import PALETTE, SETTINGS, NotebookFigure, new_figure
from kvjax.eval.report.words import words_figure

Entry = Mapping[str, Any]

LEAST = 1e-3
"""Nats at the lower end of a strip: less is nothing."""

LEVELS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Nats from which a token has the next shade."""


def shade_of(kl: float) -> int:
    """Of a divergence, 0 to 8: three steps make a factor of ten, nearly."""
    return sum(kl >= least for least in LEVELS)


def kl_map(
    pieces: Sequence[str],
    kl: Mapping[str, Sequence[float]],
    *,
    columns: int = 100,
    title: str = "",
) -> NotebookFigure:
    """A text, and below each token a cell per method with its divergence.

    Args:
        pieces: text of the predicted tokens.
        kl: by method, nats of each token, see `kvjax.eval.fidelity.told`.
        columns: characters per line.
        title: above the figure.

    Raises:
        ValueError: a method has more or fewer numbers than there are tokens.
    """
    for name, values in kl.items():
        if len(values) != len(pieces):
            raise ValueError(
                f"`pieces` has {len(pieces)} tokens, and {name!r} has {len(values)} "
                "numbers. The first token behind a context is fed, not predicted."
            )
    shades = [[shade_of(value) / 8 for value in values] for values in kl.values()]
    words = ("KL below 0.003", "10 nats or more")
    look = {"columns": columns, "title": title, "scale": words}
    names = [name[:14] for name in kl]
    bands = np.array(shades)
    return words_figure(
        pieces, bands, colors="Oranges", labels=names, every_label=True, **look
    )


def kl_figure(kl: Mapping[str, Sequence[float]], *, title: str = "") -> NotebookFigure:
    """Divergence against the place in the text, a strip for each method.

    Args:
        kl: by method, nats of each token.
        title: above the figure.
    """
    figure = new_figure(7.6, 0.75 + 0.78 * len(kl))
    finite = [v for values in kl.values() for v in values if math.isfinite(v)]
    most = max([LEAST * 10, *finite])
    with rc_context(SETTINGS):
        panels = figure.subplots(len(kl), 1, sharex=True, sharey=True, squeeze=False)
        title = title.replace("$", r"\$")
        figure.suptitle(title, fontsize=10.5, fontweight="bold", x=0.01, ha="left")
        for axes, (name, values) in zip(panels[:, 0], kl.items(), strict=True):
            places = np.arange(1, len(values) + 1)
            height = np.maximum(np.nan_to_num(values, nan=0.0, posinf=most), LEAST)
            style: dict = {"color": PALETTE[1], "linewidth": 0.9}
            axes.fill_between(places, height, LEAST, alpha=0.25, **style)
            axes.plot(places, height, **style)
            axes.set_yscale("log")
            axes.set_ylim(LEAST, 2 * most)
            axes.yaxis.set_minor_locator(NullLocator())
            mean = np.mean(values)
            label = f"{name}: mean {mean:.3g}".replace("$", r"\$")
            axes.set_title(label, fontsize=8.5, fontweight="normal", pad=2)
        panels[-1, 0].set_xlabel("token behind the context")
        figure.supylabel("KL, nats", fontsize=9)
    return figure


def strip_section(maps: Sequence[Entry]) -> str:
    """The text behind the context, method by method, in shades of divergence."""
    if not maps:
        return ""
    steps = "".join(
        f'<i class="s{n}">{f"{x:g}"}</i> ' for n, x in enumerate((0, *LEVELS))
    )
    key = legend(
        f'<span>KL from <b class="flow kl">{steps}</b> nats</span>',
        "underlined: the most likely token is another",
    )
    full = in_full(len(maps[0]["following"]["tokens"]))
    parts = [_map(entry, n == 0, n < full) for n, entry in enumerate(maps)]
    return "".join(["<h3>Token by token</h3>", key, *parts])


def _map(entry: Entry, first: bool, full: bool) -> str:
    found = entry["following"]
    kl, cells = found["kl"], cells_of(found["tokens"])
    looks, titles = [], []
    for cell in cells:
        own = [n - 1 for n in range(cell.start, cell.stop) if n > 0]
        if not own:  # fed, not predicted
            looks.append("s0 none")
            titles.append(named(cell, "read, not predicted"))
            continue
        worst = max(own, key=lambda n: kl[n])
        same = all(found["agrees"][n] for n in own)
        looks.append(f"s{shade_of(kl[worst])}{'' if same else ' all'}")
        said = f"KL {kl[worst]:.3g}, NLL {found['nll'][worst]:.3g}"
        said += f" (uncompressed {found['nll_full'][worst]:.3g})"
        titles.append(named(cell, said))
    text = flow(cells, looks, titles, "kl") if full else TOO_LONG
    finite = [value for value in kl if math.isfinite(value)]
    mean = float(np.mean(finite)) if finite else math.nan
    heights = np.array([shade_of(value) / 8 for value in kl])
    summary = (
        f"<b>{escape(label_of(entry))}</b> <span class='note'>mean {mean:.3g} nats, "
        f"worst {max(finite, default=math.nan):.3g}; most likely token the same in "
        f"{100 * np.mean(found['agrees']):.0f} %</span>"
        f"{strip(heights, 'KL along the text, logarithmic', kind='kl')}"
    )
    return folded(summary, text, open_=first)
