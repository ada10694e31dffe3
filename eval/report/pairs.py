"""Two methods on one text: what both kept, what only one did, and what neither."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvjax.cache import KVCache
from kvjax.eval.report.kept import held
from kvjax.eval.report.style import NotebookFigure
from kvjax.eval.report.token_map import kept_of
from kvjax.eval.report.words import words_figure
from kvjax.messages import shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap:
    """Slots of each layer, or of all, by who kept them; a slot is a token in a head.

    Attributes:
        both: kept by both.
        first: kept by the first alone.
        second: kept by the second alone.
        neither: kept by neither.
    """

    both: np.ndarray
    first: np.ndarray
    second: np.ndarray
    neither: np.ndarray

    @property
    def jaccard(self) -> np.ndarray:
        """What both kept, of what either kept; 1 where neither kept anything."""
        either = self.both + self.first + self.second
        return np.where(either == 0, 1.0, self.both / np.maximum(either, 1))

    @property
    def all(self) -> "Overlap":
        """Of all layers together."""
        return Overlap(**{f: np.sum(v) for f, v in vars(self).items()})


def overlap(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> Overlap:
    """Of each layer, from who kept what by `held`.

    Raises:
        ValueError: maps of different models or texts.
    """
    shapes = [tuple(layer.shape for layer in side) for side in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "two maps of one model and one text are compared; got layers of heads and "
            f"tokens {shown(shapes[0])} and {shown(shapes[1])}."
        )
    pairs = list(zip(first, second, strict=True))
    return Overlap(
        both=np.array([(a & b).sum() for a, b in pairs]),
        first=np.array([(a & ~b).sum() for a, b in pairs]),
        second=np.array([(~a & b).sum() for a, b in pairs]),
        neither=np.array([(~a & ~b).sum() for a, b in pairs]),
    )


def difference_map(
    first: KVCache | Mapping[str, Any],
    second: KVCache | Mapping[str, Any],
    pieces: Sequence[str] | str,
    *,
    names: tuple[str, str] = ("first", "second"),
    row: int = 0,
    columns: int = 100,
    title: str = "",
) -> NotebookFigure:
    """A text, and below each token the share of heads in which both, or one, kept it.

    Args:
        first: a cache after `prefill`, or an entry of a run's `maps/`.
        second: another of the same text.
        pieces: text of each token, see `token_pieces`.
        names: of the two.
        row: of the batch.
        columns: characters per line.
        title: above the figure; if left out, the names and how much they share.

    Raises:
        ValueError: see `overlap` and `token_map`.
    """
    sides = [held(kept_of(side, row), len(pieces)) for side in (first, second)]
    found = overlap(*sides).all
    a, b = (np.concatenate(side) for side in sides)
    bands = np.stack([kind.mean(axis=0) for kind in (a & b, a & ~b, b & ~a)])
    labels = ["both", f"only {names[0]}"[:14], f"only {names[1]}"[:14]]
    title = title or (
        f"{names[0]} and {names[1]}: {100 * found.jaccard:.0f} % of what either kept, "
        "both kept"
    )
    scale = ("no head", "all heads")
    look = {"columns": columns, "title": title, "labels": labels, "scale": scale}
    return words_figure(pieces, bands, every_label=True, **look)
