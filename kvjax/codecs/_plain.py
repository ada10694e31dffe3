"""Uncompressed storage in the model's dtype."""

import dataclasses
from typing import ClassVar, final

import jax
import jax.numpy as jnp

from kvjax.codecs.base import AbstractCodec, AbstractEncoded
from kvjax.turns import cut
from kvjax.types import pytree


@final
@pytree
class PlainArray(AbstractEncoded):
    """The array itself, `[*lead, S, D]`."""

    data: jax.Array

    @property
    def slots(self):
        return self.data.shape[-2]

    def decode(self, positions, rope):
        del positions, rope
        return self.data

    @property
    def stored(self):
        return self.data

    def block(self, start, size, turn=None):
        return PlainArray(data=cut(self.data, start, size, -2, turn))


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain(AbstractCodec):
    """Keep keys or values as they are.

    Cost: `D * itemsize` bytes per slot and head.
    """

    plain: ClassVar[bool] = True

    def encode(self, x, live, positions, rope, side=None):
        del positions, rope, side
        return PlainArray(data=jnp.where(live[..., None], x, 0))

    def slot_bytes(self, head_dim, itemsize):
        return float(head_dim * itemsize)

    @property
    def appendable(self):
        return True
