"""Which tokens each layer kept: a figure for notebooks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvjax.cache import KVCache
from kvjax.eval.report.kept import heads_kept
from kvjax.eval.report.style import NotebookFigure
from kvjax.eval.report.words import layer_bands, words_figure


def token_map(
    cache: KVCache | Mapping[str, Any],
    pieces: Sequence[str] | str,
    *,
    row: int = 0,
    columns: int = 100,
    title: str = "",
) -> NotebookFigure:
    """A text, and below each token of it how many KV heads of each layer kept it.

    Args:
        cache: a cache after `prefill`, or an entry of a run's `maps/`.
        pieces: text of each token, see `token_pieces`; a string where a token is a
            character.
        row: of the batch.
        columns: characters per line.
        title: above the figure.

    Returns:
        A figure; a notebook shows it. Dark cells were kept by all heads. A deep model
        has a band for several layers.

    Raises:
        ValueError: positions that `pieces` does not reach; too many tokens.
    """
    kept = kept_of(cache, row)
    share = heads_kept(kept, len(pieces)) / np.array([[len(h)] for h in kept])
    bands, labels = layer_bands(share)
    scale = ("no head", "all heads kept it")
    look = {"columns": columns, "title": title, "labels": labels, "scale": scale}
    return words_figure(pieces, bands, **look)


def kept_of(cache: KVCache | Mapping[str, Any], row: int = 0) -> Sequence[Any]:
    """By layer and head, the positions that a row of a cache, or a map, kept."""
    if isinstance(cache, Mapping):
        return cache["kept"]
    return [cache.kept_positions(i)[row] for i in range(cache.num_layers)]
