"""What each token is worth: how much the loss rises, to first order, without it."""

import dataclasses
import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvjax.eval.pieces import token_pieces
from kvjax.eval.report.flow import (
    escape,
    flow,
    folded,
    legend,
    named,
    share_bar,
    strip,
)
from kvjax.eval.report.kept import by_cell, cells_of, held, label_of, pieces_of
from kvjax.eval.report.style import NotebookFigure
from kvjax.eval.report.words import layer_bands, words_figure
from kvjax.messages import shown
from kvjax.models import checks
from kvjax.models.decoder import Decoder
from kvjax.models.slopes import gate_slopes

Entry = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenWorth:
    """What the tokens of a prompt are worth to what comes after it.

    A notebook shows the text, with a number behind each token.

    Attributes:
        worth: `[L, K, S]` nats per predicted token: how much the loss rises, to first
            order, where one head of a layer drops one token. Minus `gate_slopes`.
        pieces: text of each token.
    """

    worth: np.ndarray
    pieces: tuple[str, ...]

    @property
    def per_token(self) -> np.ndarray:
        """`[S]`: where all heads of all layers drop it."""
        return self.worth.sum(axis=(0, 1))

    def figure(self, *, columns: int = 100, title: str = "") -> NotebookFigure:
        """The text, and below each token what it is worth to each layer.

        Args:
            columns: characters per line.
            title: above the figure.
        """
        bands, labels = layer_bands(self.worth.sum(axis=1))
        most = np.abs(bands).max() or 1.0
        shades = 0.5 + 0.5 * np.sign(bands) * np.sqrt(np.abs(bands) / most)
        scale = (f"-{most:.2g} nats", f"+{most:.2g}: needed")
        look = {"columns": columns, "title": title, "labels": labels, "scale": scale}
        return words_figure(self.pieces, shades, colors="PuOr", **look)

    def _repr_html_(self) -> str:
        folder = importlib.resources.files("kvjax") / "eval" / "report" / "assets"
        style = (folder / "flow.css").read_text(encoding="utf-8")
        return f"<style>{style}</style>{_KEY}{_flow(self.per_token, self.pieces)}"


def token_worth(
    model: Decoder, tokens: Any, prompt_length: int, tokenizer: Any = None
) -> TokenWorth:
    """What each token of a prompt is worth to the text that follows it.

    Args:
        model: a decoder.
        tokens: `[T]` or `[1, T]`, the prompt and what follows it.
        prompt_length: tokens of the prompt.
        tokenizer: a Hugging Face tokenizer, for the text of the tokens.

    Raises:
        ValueError: see `kvjax.gate_slopes`; several rows; nothing follows.

    Cost: that of `kvjax.gate_slopes`.
    """
    row = np.asarray(tokens)
    row = row[None] if row.ndim == 1 else row
    if row.ndim != 2 or len(row) != 1:
        raise ValueError(
            f"`tokens` must be one text, [T] or [1, T]; got {shown(tokens)}."
        )
    checks.count("prompt_length", prompt_length, 1)
    if prompt_length >= row.shape[1]:
        raise ValueError(
            f"`prompt_length` is {prompt_length}, and there are {row.shape[1]} tokens: "
            "nothing follows that the prompt could be of worth to."
        )
    slopes = gate_slopes(model, row, None, np.array([prompt_length]))
    ids = row[0, :prompt_length].tolist()
    pieces = token_pieces(tokenizer, ids) if tokenizer else [f"{i} " for i in ids]
    worth = -np.asarray(slopes)[:, 0, :, :prompt_length]
    return TokenWorth(worth=worth, pieces=tuple(pieces))


_STEPS = "".join(f'<i class="s{n}">&nbsp;</i>' for n in range(9))
_KEY = legend(
    f'<span>worth nothing <b class="flow worth">{_STEPS}</b> worth most</span>',
    '<span><b class="flow worth"><i class="s5 harm">dotted below</i></b>: the text is '
    "told better without it</span>",
    "point at a token for its number",
)


def _flow(worth: np.ndarray, pieces: Sequence[str]) -> str:
    """Shades go with the root of what a token is worth: few are worth most of it."""
    cells = cells_of(pieces)
    own = np.add.reduceat(worth, [cell.start for cell in cells])
    most = float(np.abs(own).max()) or 1.0
    levels = np.round(8 * np.sqrt(np.abs(own) / most)).astype(int)
    looks = [
        f"s{n}{' harm' if value < 0 and n else ''}"
        for n, value in zip(levels, own, strict=True)
    ]
    titles = [
        named(cell, f"worth {value:+.3g} nats per predicted token")
        for cell, value in zip(cells, own, strict=True)
    ]
    return flow(cells, looks, titles, "worth")


def worth_section(maps: Sequence[Entry]) -> str:
    """The text in shades of worth, and how much of it each method kept.

    Args:
        maps: of one text; the first that holds `worth` says what tokens are worth.
    """
    entry = next(entry for entry in maps if entry.get("worth"))
    layers = [np.array(layer) for layer in entry["worth"]]
    heads, pieces = np.concatenate(layers), pieces_of(entry)
    helpful = np.maximum(heads, 0.0)
    lines = "".join(_line(one, heads, helpful) for one in maps)
    table = (
        '<table class="worth"><thead><tr><th scope="col" class="plain">method</th>'
        '<th scope="col" class="plain">slots kept</th><th scope="col" class="plain">'
        "worth kept</th><th></th></tr></thead><tbody>"
        f"{lines}</tbody></table>"
    )
    total = heads.sum(axis=0)
    strip_ = strip(
        by_cell(np.maximum(total, 0), cells_of(pieces)),
        "worth along the text",
        most=float(np.max(total)) or 1.0,
        kind="worth",
    )
    note = (
        "<p class='note'>How much less likely what follows becomes, to first order, "
        "when a head of a layer drops a token (<code>kvjax.gate_slopes</code>), summed "
        "over heads and layers. A slope says little of the first tokens, where heads "
        "park their attention: dropping those costs more than this. Below: of the "
        "worth of all slots that help, the share that each method kept.</p>"
    )
    text = folded(
        f"<b>{escape(entry['task'])}</b> <span class='note'>{len(pieces)} tokens</span>"
        f"{strip_}",
        _flow(total, pieces),
        open_=True,
    )
    return f"{note}{_KEY}{text}{table}"


def _line(entry: Entry, heads: np.ndarray, helpful: np.ndarray) -> str:
    kept = np.concatenate(held(entry["kept"], heads.shape[1]))
    share = float((helpful * kept).sum() / (helpful.sum() or 1.0))
    bar = f'<rect class="both" width="{100 * share:.1f}" height="8"/>'
    return (
        f'<tr><th scope="row">{escape(label_of(entry))}</th>'
        f"<td>{100 * kept.mean():.0f} %</td><td>{100 * share:.0f} %</td>"
        f"<td>{share_bar(bar)}</td></tr>"
    )
