"""Kept positions as arrays, and tokens as the cells that people see."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Cell(NamedTuple):
    """Tokens `start` to `stop` that are shown as one: most often a single token."""

    text: str
    start: int
    stop: int

    @property
    def place(self) -> str:
        """Its position, or both ends."""
        last = self.stop - 1
        return f"{self.start}" if last == self.start else f"{self.start}-{last}"


def cells_of(pieces: Sequence[str]) -> list[Cell]:
    """What is shown of a text: a token without text of its own goes with the last."""
    starts = [i for i, piece in enumerate(pieces) if piece or i == 0]
    ends = itertools.pairwise([*starts, len(pieces)])
    return [Cell(pieces[start], start, stop) for start, stop in ends]


def by_cell(values: np.ndarray, cells: Sequence[Cell]) -> np.ndarray:
    """Means of `[..., S]` values of tokens over each cell."""
    starts = [cell.start for cell in cells]
    counts = np.array([cell.stop - cell.start for cell in cells])
    return np.add.reduceat(values, starts, axis=-1) / counts


def held(kept: Sequence[Sequence[Any]], length: int) -> list[np.ndarray]:
    """Per layer `[K, length]`: which head kept which position.

    Raises:
        ValueError: positions beyond `length`.
    """
    layers = []
    for layer, heads in enumerate(kept):
        found = np.zeros((len(heads), length), bool)
        for mine, positions in zip(found, heads, strict=True):
            slots = np.asarray(positions, np.int64)
            if slots.size and slots.max() >= length:
                raise ValueError(
                    f"layer {layer} kept position {slots.max()}, but `pieces` has only "
                    f"{length} entries; pass one per token of the prompt, specials "
                    "included."
                )
            mine[slots] = True
        layers.append(found)
    return layers


def heads_kept(kept: Sequence[Sequence[Any]], length: int) -> np.ndarray:
    """Number of KV heads of each layer that kept each position, `[L, length]`."""
    return np.stack([layer.sum(axis=0) for layer in held(kept, length)])


def visible(piece: str) -> str:
    """A piece with white space and control characters that can be seen."""
    marks = {"\n": "↵", "\t": "⇥", "\r": "␍", "Ġ": " ", "▁": " "}
    shown = (marks.get(c, c if c >= " " else chr(0x2400 + ord(c))) for c in piece)
    return "".join(shown)


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
    left, pieces = entry.get("question") or "", pieces_of(entry)
    if not left or not "".join(pieces).endswith(left):
        return 0
    missing = len(left)
    for count, piece in enumerate(reversed(pieces)):
        if missing <= 0:
            return count
        missing -= len(piece)
    return len(pieces)


def level(share: float, steps: int = 8) -> int:
    """The shade of a share: only none is 0, and only all is `steps`."""
    if share <= 0 or share >= 1:
        return steps if share >= 1 else 0
    return min(max(round(share * steps), 1), steps - 1)


def label_of(entry: Mapping[str, Any]) -> str:
    """The name of a map."""
    keep = entry.get("keep")
    return entry["compression"] + ("" if keep is None else f", keep {keep:g}")
