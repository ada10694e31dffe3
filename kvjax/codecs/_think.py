"""Keys without the channels that the last queries do not look at (ThinK)."""

import dataclasses
from typing import ClassVar, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax import exact
from kvjax.codecs.base import AbstractCodec, AbstractEncoded, picked
from kvjax.config import sized
from kvjax.fields import Kept, Size
from kvjax.pallas_kernels.partial import PIECE, row_sum
from kvjax.turns import cut, take
from kvjax.types import pytree, static


@final
@pytree
class ThinkArray(AbstractEncoded):
    """Some channels of each head; the others are 0.

    `data [B, K, S, R]` are the numbers in the channels `channels [B, K, R]`, which
    ascend.
    """

    data: Float[Array, "B K S R"]
    channels: Int[Array, "B K R"]
    head_dim: int = static()

    @property
    def slots(self):
        return self.data.shape[-2]

    def decode(self, positions, rope):
        del positions, rope
        # A gather, for scatters to single channels are slow: for each channel which
        # of those held it is.
        each = jnp.arange(self.head_dim)
        mine = self.channels[..., None] == each
        held, source = jnp.any(mine, axis=-2), jnp.argmax(mine, axis=-2)
        x = jnp.take_along_axis(self.data, source[:, :, None], axis=-1)
        return jnp.where(held[:, :, None], x, 0)

    def block(self, start, size, turn=None):
        data = cut(self.data, start, size, -2, turn)
        return dataclasses.replace(self, data=data, channels=take(self.channels, turn))

    def pages(self, index, page, turn=None):
        data = picked(self.data, index, page, self.slots, turn)
        return dataclasses.replace(self, data=data, channels=take(self.channels, turn))


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class ThinK(AbstractCodec):
    """The channels of keys that weigh most in what the last queries read.

    A channel's weight is the mean of `q^2` over the last queries and the group, times
    the mean of `k^2` over the tokens that are held: of those that stay, after an
    eviction. Channels are chosen per row and head.

    Attributes:
        keep: fraction of the `D` channels that is held, in (0, 1]; rounded up.
        window: queries at the end of the prompt that are asked.

    Cost: `R` elements per slot and head, plus `R` indices per row and head.

    Source: ThinK (2407.21018) section 3; kvpress 0.5.5 `ThinKPress`, whose
    `key_channel_compression_ratio` is `1 - keep` (it stores zeros).
    Deviations: as in kvpress, squares are averaged over the group first (the paper
    takes the norm of the channel's part of `Q K'`, by query head), and all tokens of
    the prompt lose the channels (the paper spares the newest). Later tokens stay
    plain. Values, of which no query knows the channels, keep those of most energy.
    """

    keep: Kept = 0.6
    window: Size = sized(32, short=8, recent=True)
    differentiable: ClassVar[bool] = True
    flat: ClassVar[bool] = False

    def rank(self, head_dim: int) -> int:
        """Channels held, `R`."""
        return int(exact.ceil_share(head_dim, self.keep))

    @property
    def kept(self):
        return self.keep

    def with_keep(self, keep):
        return dataclasses.replace(self, keep=keep)

    def observe(self, asked, held, of):
        """Of each channel the `q^2` of the last queries, `[B, K, D]`; values: None."""
        del held
        if of == "values":
            return None
        count = jnp.sum(asked.positions >= 0, axis=1)
        index = count[:, None] - 1 - jnp.arange(self.window)
        last = asked.taken(jnp.maximum(index, 0), index >= 0)
        live = jnp.broadcast_to((last.positions >= 0)[:, None], last.q.shape[:3])
        squares = energy(last.q, live)
        b, _, d = squares.shape
        # Sums order channels as means do.
        return jnp.sum(squares.reshape(b, -1, asked.spec.groups, d), axis=2)

    def encode(self, x, live, positions, rope, side=None):
        del positions, rope
        head_dim = x.shape[-1]
        weight = energy(x, live) if side is None else energy(x, live) * side
        _, best = jax.lax.top_k(weight, self.rank(head_dim))
        channels = jnp.sort(best, axis=-1).astype(jnp.int32)
        x = jnp.where(live[..., None], x, 0)
        data = jnp.take_along_axis(x, channels[:, :, None], axis=-1)
        return ThinkArray(data=data, channels=channels, head_dim=head_dim)

    def slot_bytes(self, head_dim, itemsize):
        return float(self.rank(head_dim) * itemsize)


def energy(
    x: Float[Array, "B X S D"], live: Bool[Array, "B X S"]
) -> Float[Array, "B X D"]:
    """Sums of squares over the live slots, float32."""
    x = jnp.where(live[..., None], x, 0).astype(jnp.float32)
    # In an order that free slots do not change: channels may be nearly equal.
    x = jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % PIECE), (0, 0)])
    return row_sum(jnp.swapaxes(x * x, 2, 3))
