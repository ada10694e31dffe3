"""The `gguf` library: types of tensors and what their bytes stand for."""

import contextlib
import functools
import pathlib
from types import ModuleType

import numpy as np

from kvjax.models.gguf.header import Tensor

REMEDY = "Install it with `pip install kvjax[gguf]`."


@functools.cache
def library() -> ModuleType:
    """The library, which is an extra.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import gguf
        import gguf.quants
    except ImportError as wrong:
        raise ValueError(
            f"GGUF files need the library `gguf`, which cannot be imported ({wrong}). "
            f"{REMEDY}"
        ) from None
    return gguf


def sizes(path: pathlib.Path, what: str, kind: int) -> tuple[str, int, int]:
    """A type's name, the numbers in a block of it, and the block's bytes.

    Raises:
        ValueError: it is none of those that can be turned into floats.
    """
    known = _readable()
    if kind not in known:
        names = [name for name, *_ in known.values()]
        raise ValueError(
            f"{path}: {what} is of type {_name(kind)}, which is not read; expected one "
            f"of {names}. Convert the model to one of these."
        )
    return known[kind]


@functools.cache
def _readable() -> dict[int, tuple[str, int, int]]:
    """The types of floats, and those that the library turns into floats."""
    gguf = library()
    found = {}
    for kind in gguf.GGMLQuantizationType:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        with contextlib.suppress(NotImplementedError):
            floats(np.zeros((1, size), np.uint8), int(kind))
            found[int(kind)] = (kind.name, block, size)
    return found


def _name(kind: int) -> str:
    gguf = library()
    known = {int(one): one.name for one in gguf.GGMLQuantizationType}
    return known.get(kind, f"{kind}, which is unknown")


def floats(data: np.ndarray, kind: int) -> np.ndarray:
    """Bytes of rows `[R, bytes]` as float32 `[R, numbers]`; exact.

    What is damaged gives NaN and Inf, which whoever takes the numbers looks for.
    """
    gguf = library()
    with np.errstate(all="ignore"):
        found = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(kind))
    return found.astype(np.float32, copy=False)


def read(
    path: pathlib.Path, tensor: Tensor, start: int = 0, stop: int | None = None
) -> np.ndarray:
    """Rows of a tensor as float32 `[R, ...]`, in the file's order; one row of a vector.

    Raises:
        ValueError: the file ended in the meantime.
    """
    first, *others = tensor.shape
    each = tensor.size // tensor.row_bytes // first if others else 1
    start, stop = (start, first if stop is None else stop) if others else (0, 1)
    count = (stop - start) * each
    with path.open("rb") as file:
        file.seek(tensor.start + start * each * tensor.row_bytes)
        data = file.read(count * tensor.row_bytes)
    if len(data) != count * tensor.row_bytes:
        raise ValueError(
            f"{path} ended while a tensor was read. Something else writes to it; load "
            "it when that is done."
        )
    raw = np.frombuffer(data, np.uint8).reshape(count, tensor.row_bytes)
    found = floats(raw, tensor.kind)
    return found.reshape(-1, *others) if others else found
