"""Keys and values cut to the first coefficients of a projection that was trained."""

import dataclasses
import math
from typing import ClassVar, final

import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.codecs.base import AbstractCodec, AbstractEncoded, picked
from kvjax.fields import Fraction
from kvjax.turns import cut, take
from kvjax.types import pytree, static


@final
@pytree
class ProjectedArray(AbstractEncoded):
    """`x[b, k, s] = rotate(coefficients[b, k, s] @ basis[k])`, rank last.

    `coefficients [B, K, S, R]`; `basis [K, R, D]`, one for all rows, its vectors
    orthonormal. Keys are held before RoPE; `decode` rotates them.
    """

    coefficients: Float[Array, "B K S R"]
    basis: Float[Array, "K R D"]
    rotated: bool = static()

    @property
    def slots(self):
        return self.coefficients.shape[-2]

    def decode(self, positions, rope):
        x = jnp.einsum("BKSR,KRD->BKSD", self.coefficients, self.basis)
        return rope.rotate(x, jnp.maximum(positions, 0)) if self.rotated else x

    def block(self, start, size, turn=None):
        coefficients = cut(self.coefficients, start, size, -2, turn)
        basis = take(self.basis, turn)
        return dataclasses.replace(self, coefficients=coefficients, basis=basis)

    def pages(self, index, page, turn=None):
        coefficients = picked(self.coefficients, index, page, self.slots, turn)
        basis = take(self.basis, turn)
        return dataclasses.replace(self, coefficients=coefficients, basis=basis)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Projected(AbstractCodec):
    """The leading coefficients in the basis that the model has learnt.

    Any prefix of the basis is one: each vector is made orthonormal to those before it
    (QR), so that the first `R` do not depend on the others.

    Attributes:
        keep: fraction of the `D` coefficients that is held, in (0, 1]; rounded up.
        rotated: True for keys, which are projected before RoPE; values have none.

    Cost: `R` elements per slot and head, plus `K * R * D` per layer.

    Source: MatryoshkaKV (2410.14731). Deviations: QR in place of its Cayley transform
    keeps the projection orthogonal, also through saving in 16 bits; all layers and
    heads have one rank, where the paper searches for theirs after training. The prompt
    is encoded; later tokens stay plain.
    """

    keep: Fraction = 0.5
    rotated: bool = True
    needs_basis: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True
    flat: ClassVar[bool] = False

    def rank(self, head_dim: int) -> int:
        """Coefficients held, `R`."""
        return max(1, math.ceil(head_dim * self.keep - 1e-9))

    @property
    def kept(self):
        return self.keep

    def with_keep(self, keep):
        return dataclasses.replace(self, keep=keep)

    def observe(self, asked, held, of):
        del held
        return asked.key_basis if of == "keys" else asked.value_basis

    def encode(self, x, live, positions, rope, side=None):
        assert side is not None  # checked before any compute
        x = jnp.where(live[..., None], x, 0)
        plain = rope.unrotate(x, jnp.maximum(positions, 0)) if self.rotated else x
        leading = orthonormal(side, self.rank(x.shape[-1]))
        wide = plain.astype(jnp.float32)
        return ProjectedArray(
            coefficients=jnp.einsum("BKSD,KRD->BKSR", wide, leading).astype(x.dtype),
            basis=leading.astype(x.dtype),
            rotated=self.rotated,
        )

    def slot_bytes(self, head_dim, itemsize):
        return float(self.rank(head_dim) * itemsize)


def orthonormal(basis: Float[Array, "K D D"], rank: int) -> Float[Array, "K R D"]:
    """The first `rank` vectors of each head's basis, orthonormal in order, float32.

    Those that are orthonormal already stay as they are. Differentiable where they are
    linearly independent.
    """
    columns = basis[:, :rank].astype(jnp.float32).mT
    q, r = jnp.linalg.qr(columns)
    sign = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)
    return (q * sign[:, None, :]).mT
