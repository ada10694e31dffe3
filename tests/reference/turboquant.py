"""Reference rotated codec: TurboQuant as its implementers settled on it.

Source: TurboQuant (2504.19874) by way of LANDSCAPE 1.4: Hadamard rotation, Lloyd-Max
levels of one coordinate, norm correction, no QJL sign sketch; uniform values; the first
and the last two layers plain. A vector `x [D]` (a key after RoPE; `D` a power of two,
at least 4) is stored as `D` codes of `bits` bits and one number, its norm.
"""

import functools

import numpy as np

from .codecs import kivi_values


def hadamard(width: int) -> np.ndarray:
    """Sylvester's matrix over `sqrt(width)`: symmetric, orthogonal, its own inverse.

    Entry `(i, j)` is -1 to the number of ones that `i` and `j` share in binary.
    """
    assert width & (width - 1) == 0
    signs = [
        [(-1.0) ** (i & j).bit_count() for j in range(width)] for i in range(width)
    ]
    return np.array(signs) / np.sqrt(width)


def rotate_in(x: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """`H (signs * x)` of `x [..., D]`: first the signs, then Hadamard."""
    return (np.asarray(x, np.float64) * signs) @ hadamard(x.shape[-1])


def rotate_out(y: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """The inverse of `rotate_in`: `signs * (H y)`."""
    return (y @ hadamard(y.shape[-1])) * signs


def _mass(low: float, high: float, width: int, nodes) -> float:
    """Integral of `(1 - t^2)^((width - 3) / 2)`: Gauss-Legendre over `t = sin(a)`."""
    low, high = np.arcsin(low), np.arcsin(high)
    middle, half = (low + high) / 2, (high - low) / 2
    return float(
        half * (nodes[1] * np.cos(middle + half * nodes[0]) ** (width - 2)).sum()
    )


def _moment(low: float, high: float, width: int) -> float:
    """Integral of `t (1 - t^2)^((width - 3) / 2)`, in closed form."""
    power = (width - 1) / 2
    return ((1 - low * low) ** power - (1 - high * high) ** power) / (2 * power)


@functools.cache
def lloyd_max_levels(width: int, bits: int, tolerance: float = 1e-13) -> np.ndarray:
    """The `2**bits` levels, ascending and symmetric, with the least mean square error.

    For one coordinate of a uniformly random unit vector in `width` dimensions, whose
    density on [-1, 1] goes with `(1 - t^2)^((width - 3) / 2)`. Lloyd's iteration on
    the positive half (which makes the levels exactly symmetric): bounds midway between
    levels, levels at the mean of their cell, until none moves by more than `tolerance`.
    """
    assert width >= 4
    nodes = np.polynomial.legendre.leggauss(96)
    count = 2 ** (bits - 1)
    far = min(1.0, 14 / np.sqrt(width))  # beyond it there is no mass worth a float
    levels = (np.arange(count) + 0.5) / count * min(0.9, 3 / np.sqrt(width))
    while True:
        bounds = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [far]])
        cells = list(zip(bounds[:-1], bounds[1:], strict=True))
        new = [_moment(a, b, width) / _mass(a, b, width, nodes) for a, b in cells]
        moved = np.abs(np.array(new) - levels).max()
        levels = np.array(new)
        if moved <= tolerance:
            return np.concatenate([-levels[::-1], levels])


def encode(
    x: np.ndarray, signs: np.ndarray, *, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """Codes `[..., D]` and norms `[...]` of `x [..., D]`.

    The unit vector is rotated, each coordinate takes the index of the nearest level
    (the lower one between two). A zero vector has norm 0 and codes that say nothing.
    """
    x = np.asarray(x, np.float64)
    norms = np.sqrt((x**2).sum(-1))
    unit = x / np.where(norms > 0, norms, 1.0)[..., None]
    levels = lloyd_max_levels(x.shape[-1], bits)
    middles = (levels[1:] + levels[:-1]) / 2
    return np.searchsorted(middles, rotate_in(unit, signs), side="left"), norms


def decode(
    codes: np.ndarray, norms: np.ndarray, signs: np.ndarray, *, bits: int
) -> np.ndarray:
    """`[..., D]` read back: levels scaled to the stored norm, then rotated back.

    The scaling is the norm correction: without it the vector would be `norm` times
    levels whose own norm is not one. One number does: a codec may store
    `norm / ||levels||` in place of the norm.
    """
    levels = lloyd_max_levels(codes.shape[-1], bits)[codes]
    own = np.sqrt((levels**2).sum(-1))
    return rotate_out(levels * (norms / own)[..., None], signs)


def read_back(x: np.ndarray, signs: np.ndarray, *, bits: int) -> np.ndarray:
    """`x [..., D]` encoded and decoded."""
    codes, norms = encode(x, signs, bits=bits)
    return decode(codes, norms, signs, bits=bits)


def uniform_values(v: np.ndarray, *, bits: int, group: int) -> np.ndarray:
    """Values `[K, S, D]` read back: per token, affine, groups of `group` channels."""
    return kivi_values(v, bits=bits, group=group)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """`[D]` codes in `D * bits / 8` bytes: code `i` from bit `i * bits`, low first."""
    stream = (codes[:, None] >> np.arange(bits)) & 1
    return np.packbits(stream.ravel().astype(np.uint8), bitorder="little")


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """The codes in `packed`."""
    stream = np.unpackbits(packed, bitorder="little").reshape(-1, bits)
    return (stream.astype(int) << np.arange(bits)).sum(axis=1)


def bits_per_vector(width: int, bits: int, *, norm_bits: int = 16) -> int:
    """What one vector takes: its codes and its norm."""
    return width * bits + norm_bits


def plain_layers(n_layers: int, edge: int = 2) -> np.ndarray:
    """Mask `[L]` of the layers left as they are: the first and last `edge`."""
    layers = np.arange(n_layers)
    return (layers < edge) | (layers >= n_layers - edge)
