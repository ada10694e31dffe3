"""Coordinates of unit vectors as codes of the levels with the least mean error."""

import dataclasses
import functools
from typing import Annotated, ClassVar, final

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8

from kvjax.codecs.base import AbstractCodec, AbstractEncoded
from kvjax.fields import OneOf
from kvjax.pallas_kernels.partial import feature_sum
from kvjax.pallas_kernels.quantized import half_bits, numbers
from kvjax.turns import cut
from kvjax.types import pytree, static

BITS = (1, 2, 3, 4)
"""Of a code."""

MOST = float(np.finfo(np.float16).max)
"""The largest scale: longer vectors are cut to about this length."""


@final
@pytree
class LloydMaxArray(AbstractEncoded):
    """`x = scale * levels[codes]`, the codes packed: code `i` from bit `i * bits` on.

    `codes [*lead, S, D * bits / 8]`, lowest bits first; `scale [*lead, S, 1]` are the
    int16 bits of float16 numbers, see `Quantized`.
    """

    codes: UInt8[Array, "*lead S X"]
    scale: Int[Array, "*lead S 1"]
    bits: int = static()
    dtype: str = static()

    @property
    def slots(self):
        return self.codes.shape[-2]

    def decode(self, positions, rope):
        del positions, rope
        codes = repacked(self.codes, 8, self.bits)
        levels = jnp.asarray(levels_of(codes.shape[-1], self.bits), jnp.float32)
        x = levels.at[codes].get(mode="promise_in_bounds")
        return (x * numbers(self.scale).astype(jnp.float32)).astype(self.dtype)

    def block(self, start, size, turn=None):
        codes, scale = (cut(x, start, size, -2, turn) for x in (self.codes, self.scale))
        return dataclasses.replace(self, codes=codes, scale=scale)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class LloydMax(AbstractCodec):
    """A vector's length, and the nearest level to each coordinate of its direction.

    The levels are those of a coordinate of a uniformly random direction: for vectors
    whose channels are alike, as behind a rotation (`Hadamard`). The scale is the
    length over that of the levels themselves, so that what is read back has the length
    of what was held (norm correction).

    Attributes:
        bits: 1 to 4; `D * bits` must fill bytes.

    Cost: `D * bits / 8 + 2` bytes per slot and head.

    Source: TurboQuant (2504.19874) section 3.1, with what its implementers agree on
    (vLLM `turboquant_*_nc`): the norm correction, and no sign sketch of the residual.
    Deviations: a length that float16 does not hold is cut to 65504, or to 0 below 3e-8.
    """

    bits: Annotated[int, OneOf(*BITS, hint="`affine` has 8.")] = 4
    coded: ClassVar[bool] = True

    def encode(self, x, live, positions, rope, side=None):
        del positions, rope, side
        wide = jnp.where(live[..., None], x, 0).astype(jnp.float32)
        peak = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
        some = peak >= jnp.finfo(jnp.float32).tiny
        # Of order 1, so that no square is too large or too small.
        wide = jnp.where(some, wide / jnp.where(some, peak, 1), 0)
        length = jnp.sqrt(feature_sum(wide * wide))[..., None]
        unit = wide / jnp.where(some, length, 1)
        levels = levels_of(x.shape[-1], self.bits)
        middles = jnp.asarray((levels[1:] + levels[:-1]) / 2, jnp.float32)
        codes = jnp.sum(unit[..., None] > middles, axis=-1, dtype=jnp.uint8)
        own = jnp.asarray(levels, jnp.float32)[codes]
        own = jnp.sqrt(feature_sum(own * own))
        scale = jnp.minimum(peak * length / own[..., None], MOST)
        return LloydMaxArray(
            codes=repacked(codes, self.bits, 8),
            scale=half_bits(scale),
            bits=self.bits,
            dtype=str(x.dtype),
        )

    def slot_bytes(self, head_dim, itemsize):
        del itemsize
        return head_dim * self.bits / 8 + 2

    @property
    def appendable(self):
        return True

    def with_bits(self, bits):
        return dataclasses.replace(self, bits=bits)

    def validate(self, head_dim):
        if head_dim * self.bits % 8:
            raise ValueError(
                f"{self.bits}-bit codes of a vector must fill bytes; got "
                f"head_dim={head_dim}. Use 4 bits, or a multiple of 8 channels."
            )


@functools.lru_cache
def levels_of(head_dim: int, bits: int) -> np.ndarray:
    """The `2**bits` levels, ascending, with the least mean square error.

    Lloyd's iteration in float64: bounds midway between levels, levels at the mean of
    their cell. A coordinate is the sine of an angle whose density goes with
    `cos(angle)**(D - 2)`; cells are integrated by Gauss and Legendre's rule.
    """
    nodes, weights = np.polynomial.legendre.leggauss(80)
    far = min(np.pi / 2, 14 / np.sqrt(head_dim))  # no mass worth a number beyond
    count = 2 ** (bits - 1)  # the others are their negatives
    levels, moved = np.linspace(0, 1.5, 2 * count + 1)[1::2] / np.sqrt(head_dim), 1.0
    while moved > 1e-13:
        edges = np.arcsin([0.0, *(levels[1:] + levels[:-1]) / 2])
        edges = np.append(edges, far)
        half = np.diff(edges)[:, None] / 2
        angles = edges[:-1, None] + half * (1 + nodes)
        mass = weights * np.cos(angles) ** (head_dim - 2)
        old, levels = levels, (mass * np.sin(angles)).sum(1) / mass.sum(1)
        moved = np.abs(levels - old).max()
    return np.concatenate([-levels[::-1], levels])


def repacked(x: UInt8[Array, "*lead X"], old: int, new: int) -> UInt8[Array, "*lead Y"]:
    """Numbers of `old` bits as those of `new` bits: one stream, lowest bits first."""
    stream = x[..., None] >> jnp.arange(old, dtype=jnp.uint8) & 1
    stream = stream.reshape(*x.shape[:-1], -1, new)
    return jnp.sum(stream << jnp.arange(new, dtype=jnp.uint8), axis=-1, dtype=jnp.uint8)
