"""The tensors of a GGUF file as a source of checkpoint tensors, some rows at a time."""

import pathlib
from collections.abc import Iterator

import numpy as np

from kvjax.models.gguf.header import Header, Tensor
from kvjax.models.gguf.library import read
from kvjax.models.gguf.metadata import Metadata
from kvjax.models.gguf.names import (
    LONG_FACTORS,
    ROPE_FACTORS,
    SHORT_FACTORS,
    checkpoint_name,
    heads_of,
    is_shifted,
)
from kvjax.models.shards import CHUNK_BYTES

_SETTINGS = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)


class Weights:
    """A file's tensors by their names in Hugging Face checkpoints, as float32.

    Raises:
        ValueError: two tensors are one of a checkpoint, or have rows that are no heads.
    """

    def __init__(self, header: Header):
        self.place: pathlib.Path = header.path
        about = Metadata(header)
        self.architecture = about.architecture
        self.tensors: dict[str, tuple[str, Tensor, int]] = {}
        for own, tensor in header.tensors.items():
            if own in _SETTINGS:
                continue
            name = checkpoint_name(self.architecture, own)
            if name in self.tensors:
                raise ValueError(
                    f"{self.place} has {own[:160]!r} and "
                    f"{self.tensors[name][0][:160]!r}, which are the same tensor. The "
                    "file is damaged."
                )
            heads = heads_of(self.architecture, own, about.heads, about.kv_heads)
            if heads and tensor.shape[0 if len(tensor.shape) > 1 else -1] % (2 * heads):
                raise ValueError(
                    f"{self.place}: tensor {own[:160]!r} has the shape "
                    f"{tensor.shape}, and {heads} heads of an even width do not divide "
                    "its rows. The file contradicts itself."
                )
            self.tensors[name] = (own, tensor, heads)
        self.files = dict.fromkeys(self.tensors, self.place)
        self.shapes = {name: t.shape for name, (_, t, _) in self.tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> Iterator[np.ndarray]:
        """Rows `start:stop` of a tensor, `CHUNK_BYTES` at a time."""
        own, tensor, heads = self.tensors[name]
        if len(tensor.shape) == 1:
            order = _order(0, tensor.shape[0], heads, tensor.shape[0])
            yield self._shift(own, read(self.place, tensor)[0][order])[start:stop]
            return
        step = max(1, CHUNK_BYTES // (4 * tensor.shape[-1]))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            order = _order(first, last, heads, tensor.shape[0])
            low, high = int(order.min()), int(order.max()) + 1
            found = read(self.place, tensor, low, high)[order - low]
            yield self._shift(own, found)

    def _shift(self, own: str, values: np.ndarray) -> np.ndarray:
        return values - 1 if is_shifted(self.architecture, own) else values


def _order(first: int, last: int, heads: int, rows: int) -> np.ndarray:
    """Which rows of the file are rows `first:last` of a checkpoint.

    Channel `i` of a head's first half and of its second one are a pair that RoPE turns.
    The file has them next to each other.
    """
    wanted = np.arange(first, last)
    if not heads:
        return wanted
    width = rows // heads
    head, channel = wanted // width, wanted % width
    half, pair = channel // (width // 2), channel % (width // 2)
    return head * width + 2 * pair + half
