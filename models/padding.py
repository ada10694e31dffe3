"""Rows of several lengths as one array."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def pad_rows(
    rows: Sequence[Any],
    width: int | None = None,
    *,
    fill: int = 0,
    dtype: Any = "int32",
) -> tuple[np.ndarray, np.ndarray]:
    """`[B, width]` with `fill` behind each row, and the rows' lengths `[B]`.

    Args:
        rows: sequences of numbers, none longer than `width`.
        width: None: that of the longest.
        fill: what stands where a row has ended.
        dtype: of the array.
    """
    lengths = np.array([len(row) for row in rows], np.int32)
    shape = (len(rows), int(lengths.max()) if width is None else width)
    out = np.full(shape, fill, dtype)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out, lengths
