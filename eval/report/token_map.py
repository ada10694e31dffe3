"""Which tokens each layer kept: a figure for notebooks, data for the page."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context

from kvjax.cache import KVCache
from kvjax.eval.report.style import SETTINGS, NotebookFigure, new_figure


def token_map(
    cache: KVCache | Mapping[str, Any],
    pieces: Sequence[str] | str,
    *,
    row: int = 0,
    columns: int = 64,
    title: str = "",
) -> NotebookFigure:
    """A text, and below each piece of it how many KV heads of each layer kept it.

    Args:
        cache: a cache after `prefill`, or an entry of a run's `maps/`.
        pieces: text of each position: a string where a token is a character, else one
            string per token (`tokenizer.convert_ids_to_tokens(ids)`).
        row: of the batch.
        columns: pieces per line.
        title: above the figure.

    Returns:
        A figure; a notebook shows it. Dark cells were kept by all heads.

    Raises:
        ValueError: positions that `pieces` does not reach.
    """
    if isinstance(cache, Mapping):
        kept = cache["kept"]
    else:
        kept = [cache.kept_positions(i)[row] for i in range(cache.num_layers)]
    share = heads_kept(kept, len(pieces)) / np.array([[len(h)] for h in kept])
    lines, layers = -(-len(pieces) // columns), len(kept)
    width = min(columns, len(pieces))
    figure = new_figure(0.155 * width + 0.9, 0.34 * lines + 0.1 * layers * lines + 0.5)
    with rc_context({**SETTINGS, "axes.grid": False, "font.family": "monospace"}):
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=10)
        panels = figure.subplots(lines, 1, squeeze=False)[:, 0]
        for line, axes in enumerate(panels):
            part = slice(line * columns, (line + 1) * columns)
            _line(axes, share[:, part], pieces[part], width)
    return figure


def _line(axes, share: np.ndarray, pieces: Sequence[str], width: int) -> None:
    """One line of text above its cells, a row of cells per layer."""
    layers = len(share)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for index, piece in enumerate(pieces):
        text = visible(piece).replace("$", r"\$")
        axes.text(index, -0.72, text, ha="center", va="bottom", fontsize=8)
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_xticks([])
    axes.set_yticks([0, layers - 1] if layers > 1 else [0])
    axes.set_yticklabels(["layer 0", str(layers - 1)][: min(2, layers)], fontsize=7)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def heads_kept(kept: Sequence[Sequence[Any]], length: int) -> np.ndarray:
    """Number of KV heads of each layer that kept each position, `[L, length]`."""
    counts = np.zeros((len(kept), length), np.int32)
    for layer, heads in enumerate(kept):
        for positions in heads:
            slots = np.asarray(positions, np.int64)
            if slots.size and slots.max() >= length:
                raise ValueError(
                    f"layer {layer} kept position {slots.max()}, but `pieces` has only "
                    f"{length} entries; pass one per token of the prompt, specials "
                    "included."
                )
            counts[layer, slots] += 1
    return counts


def visible(piece: str) -> str:
    """A piece with white space that can be seen; special tokens as one mark."""
    if len(piece) > 2 and piece[0] == "<" and piece[-1] == ">":
        return "◆"
    return piece.replace("\n", "↵").replace("Ġ", " ").replace("▁", " ")


def pieces_of(entry: Mapping[str, Any]) -> list[str]:
    """Text of each position of a run's map.

    Maps may hold `tokens`; without it a token is a character, and one position more
    than the text has is the mark of its beginning.
    """
    if entry.get("tokens"):
        return list(entry["tokens"])
    text = entry["text"]
    heads = (positions for layer in entry["kept"] for positions in layer)
    last = max((max(positions, default=-1) for positions in heads), default=-1)
    return ["◆", *text] if last >= len(text) else list(text)


def question_pieces(entry: Mapping[str, Any]) -> int:
    """How many pieces at the end of a map are its question; 0 if it was not read."""
    left = entry.get("question") or ""
    for count, piece in enumerate(reversed(pieces_of(entry))):
        if not left:
            return count
        if not left.endswith(piece):
            return 0
        left = left.removesuffix(piece)
    return 0
