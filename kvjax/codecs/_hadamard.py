"""Vectors turned by random signs and a Hadamard transform before they are coded."""

import dataclasses
import functools
import math
from typing import final

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kvjax.codecs.base import AbstractCodec, AbstractEncoded
from kvjax.fields import Seed
from kvjax.types import pytree, static


@final
@pytree
class HadamardArray(AbstractEncoded):
    """`x = signs * H y`, with `y` as another codec holds it; `signs` are drawn."""

    of: AbstractEncoded
    seed: int = static()
    dtype: str = static()

    @property
    def slots(self):
        return self.of.slots

    @property
    def block_multiple(self):
        return self.of.block_multiple

    def decode(self, positions, rope):
        y = self.of.decode(positions, rope).astype(jnp.float32)
        x = walsh_hadamard(y) * signs_of(self.seed, y.shape[-1])
        return x.astype(self.dtype)

    def settled(self):
        return dataclasses.replace(self, of=self.of.settled())

    @property
    def settles(self):
        return self.of.settles

    def block(self, start, size, turn=None):
        return dataclasses.replace(self, of=self.of.block(start, size, turn))


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Hadamard(AbstractCodec):
    """Another codec's codes, of vectors whose coordinates are all alike.

    Random signs, then the Walsh-Hadamard transform, orthonormal: no length and no inner
    product changes, and what single channels had lies in all of them.

    Attributes:
        of: the codec that holds the turned vectors; one with codes.
        seed: of the signs, `D` of them, the same in all layers and heads.

    Cost: what `of` costs; `log2(D)` additions per number, here and back.

    Source: QuaRot (2404.00456) section 3; the implementers of TurboQuant (2504.19874)
    have it in place of that paper's dense random rotation.
    Deviations: keys are turned back when they are read (QuaRot turns the queries).
    """

    of: AbstractCodec
    seed: Seed = 0

    def __post_init__(self):
        super().__post_init__()
        if not self.of.coded:
            raise ValueError(
                "a rotation helps codes, which want channels alike, and nothing else; "
                f"got of={type(self.of).__name__}. Use a codec with bits, such as "
                "`lloyd_max` or `affine`."
            )

    @property
    def coded(self):
        return self.of.coded

    @property
    def flat(self):
        return self.of.flat

    def encode(self, x, live, positions, rope, side=None):
        del side  # what a codec knows of vectors before they are turned is no use
        wide = jnp.where(live[..., None], x, 0).astype(jnp.float32)
        turned = walsh_hadamard(wide * signs_of(self.seed, x.shape[-1]))
        held = self.of.encode(turned, live, positions, rope)
        return HadamardArray(of=held, seed=self.seed, dtype=str(x.dtype))

    def slot_bytes(self, head_dim, itemsize):
        return self.of.slot_bytes(head_dim, itemsize)

    @property
    def appendable(self):
        return self.of.appendable

    @property
    def append_multiple(self):
        return self.of.append_multiple

    def with_bits(self, bits):
        return dataclasses.replace(self, of=self.of.with_bits(bits))

    def validate(self, head_dim):
        if head_dim & (head_dim - 1):
            raise ValueError(
                "the Hadamard transform needs a power of two; got "
                f"head_dim={head_dim}. Use its codec without the rotation: "
                f"{type(self.of).__name__}."
            )
        self.of.validate(head_dim)


@functools.lru_cache
def signs_of(seed: int, head_dim: int) -> np.ndarray:
    """`[D]` of -1 and 1, float32."""
    draw = np.random.default_rng(seed).integers(0, 2, head_dim)
    return (2 * draw - 1).astype(np.float32)


def walsh_hadamard(x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
    """`H x`, with `H` symmetric, orthonormal and its own inverse; float32.

    Entry `(i, j)` of `H` is -1 to the number of ones that `i` and `j` share in binary,
    over `sqrt(D)`.
    """
    *lead, width = x.shape
    half = 1
    while half < width:
        pairs = x.reshape(*lead, width // (2 * half), 2, half)
        one, other = pairs[..., 0, :], pairs[..., 1, :]
        x = jnp.stack([one + other, one - other], axis=-2).reshape(*lead, width)
        half *= 2
    return x * np.float32(1 / math.sqrt(width))
