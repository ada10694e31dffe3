"""Low-rank keys: a per-prompt basis shared by all heads, rotated on read."""

import dataclasses
import math
from typing import ClassVar, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.codecs.base import AbstractCodec, AbstractEncoded
from kvjax.fields import Fraction
from kvjax.memory import beside
from kvjax.pallas_kernels.partial import PIECE
from kvjax.turns import cut, take
from kvjax.types import pytree, static

RANKS = 8
"""Ranks that arrays are cut to are multiples of it."""


@final
@pytree
class LowRankArray(AbstractEncoded):
    """`x[b, k, s] = rotate(coefficients[b, s] @ basis[b, k])`, rank last.

    `coefficients [B, S, R]` belong to a slot of all heads together, or after `pages`,
    where heads have slots of their own, `[B, K, S, R]`; `basis [B, K, R, D]`. Keys are
    held before RoPE; `decode` rotates them.
    """

    coefficients: Float[Array, "B S R"] | Float[Array, "B K S R"]
    basis: Float[Array, "B K R D"]
    rotated: bool = static()

    @property
    def slots(self):
        return self.coefficients.shape[-2]

    @property
    def rank(self) -> int:
        """Components held."""
        return self.coefficients.shape[-1]

    def decode(self, positions, rope):
        rows = "BSR" if self.coefficients.ndim < self.basis.ndim else "BKSR"
        x = jnp.einsum(f"{rows},BKRD->BKSD", self.coefficients, self.basis)
        return rope.rotate(x, jnp.maximum(positions, 0)) if self.rotated else x

    def block(self, start, size, turn=None):
        coefficients = cut(self.coefficients, start, size, -2, turn)
        basis = take(self.basis, turn)
        return dataclasses.replace(self, coefficients=coefficients, basis=basis)

    def pages(self, index, page, turn=None):
        coefficients, basis = take((self.coefficients, self.basis), turn)
        slot = index[..., None] * page + jnp.arange(page)
        slot = slot.reshape(*index.shape[:2], -1)
        at = beside((jnp.arange(len(slot))[:, None, None], slot), coefficients)
        mine = coefficients[at]
        return dataclasses.replace(self, coefficients=mine, basis=basis)

    def settled(self):
        """The leading components, as many as some row needs, rounded up to `RANKS`."""
        used = jnp.any(self.basis != 0, axis=(-3, -1))
        rank = int(jnp.max(jnp.sum(used, axis=-1)))
        rank = min(self.rank, max(RANKS, -(-rank // RANKS) * RANKS))
        return dataclasses.replace(
            self,
            coefficients=self.coefficients[..., :rank],
            basis=self.basis[..., :rank, :],
        )


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank(AbstractCodec):
    """Leading singular components of the prompt's keys, by energy.

    Keys are rotated back to before RoPE, where they are far closer to low rank,
    and the heads of a layer are concatenated, so that rank goes to the heads that
    need it. The basis is computed per sequence from its own tokens.

    Attributes:
        energy: share of the squared norm to keep, in (0, 1]; components beyond it
            are dropped.
        keep: at most this fraction of the `K * D` components, in (0, 1]; the static
            capacity under `jit`. Outside of `jit` the arrays are cut to the rank
            that `energy` needs (next multiple of 8), so the saving is real.
        rotated: True for keys; values have no RoPE to undo.

    Cost: `R` elements per slot for all heads together, plus `R * K * D` per prompt.

    Source: ShadowKV (2410.21465) section 3 (joint SVD of pre-RoPE keys).
    Deviations: rank by energy instead of a fixed 160; keys only by default; the
    SVD is the eigendecomposition of the `K D x K D` Gram matrix in float32.
    """

    energy: Fraction = 0.95
    keep: Fraction = 0.75
    rotated: bool = True
    flat: ClassVar[bool] = False

    @property
    def kept(self):
        return self.keep

    def with_keep(self, keep):
        return dataclasses.replace(self, keep=keep)

    def encode(self, x, live, positions, rope, side=None):
        del side
        x = jnp.where(live[..., None], x, 0)
        plain = rope.unrotate(x, jnp.maximum(positions, 0)) if self.rotated else x
        b, k, s, d = x.shape
        rows = jnp.moveaxis(plain, 1, 2).reshape(b, s, k * d).astype(jnp.float32)
        # Products of whole pieces: XLA on a CPU orders the sums of others otherwise.
        rows = jnp.pad(rows, [(0, 0), (0, -s % PIECE), (0, 0)])
        gram = jnp.einsum("BSX,BSY->BXY", rows, rows)
        values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(gram))
        values, vectors = values[:, ::-1], vectors[:, :, ::-1]
        rank = max(1, math.ceil(k * d * self.keep))
        values = jnp.maximum(values, 0)
        before = jnp.cumsum(values, axis=-1) - values
        needed = before < self.energy * jnp.sum(values, axis=-1, keepdims=True)
        if self.energy == 1.0:  # float sums end early on tiny tails
            needed = jnp.ones_like(needed)
        basis = jnp.where(needed[:, None, :], vectors, 0)[:, :, :rank]
        coefficients = jnp.einsum("BSX,BXR->BSR", rows, basis)[:, :s].astype(x.dtype)
        basis = jnp.moveaxis(basis.reshape(b, k, d, rank), 3, 2)
        return LowRankArray(
            coefficients=coefficients, basis=basis.astype(x.dtype), rotated=self.rotated
        )

    def slot_bytes(self, head_dim, itemsize):
        return head_dim * itemsize * self.keep
