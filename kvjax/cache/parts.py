"""Parts of a layer's cache: each holds tokens in one layout and attends by itself."""

import abc
import dataclasses
from typing import TYPE_CHECKING, Any, Self, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.blocks import attend_blocks
from kvjax.codecs import AbstractCodec, AbstractEncoded
from kvjax.codecs.base import put_block
from kvjax.pallas_kernels.decode_attention import decode_attention
from kvjax.pallas_kernels.decode_attention.api import MOST_QUERIES
from kvjax.pallas_kernels.partial import Partial, softmax_partial
from kvjax.pallas_kernels.slots import slot_logits, slot_mask
from kvjax.turns import Turn, flat, put, row_of, take
from kvjax.types import EMPTY, NEG_INF, LayerSpec, nbytes, pytree

if TYPE_CHECKING:  # the tail is itself a part
    from kvjax.cache.tail import Tail


class AbstractPart(abc.ABC):
    """Some of a layer's tokens. A pytree; `positions == EMPTY` marks a free slot.

    Keys, values and positions of a part have the same number of slots, a multiple
    of what its codecs group.
    """

    positions: Int[Array, "*lead S"]

    @abc.abstractmethod
    def attend(
        self,
        q: Float[Array, "B H T D"],
        q_positions: Int[Array, "B T"],
        spec: LayerSpec,
        limit: Int[Array, "B T"] | None = None,
        turn: Turn = None,
    ) -> Partial:
        """Attention over the live slots of this part; `out` and `lse` in float32.

        Args:
            q: queries after RoPE.
            q_positions: their absolute positions; -1 sees nothing.
            spec: the layer.
            limit: slots that each query may see, from the first; None: all. Only
                parts that grow heed it (the parallel form holds their later blocks).
            turn: which layer's, where the part is that of several.
        """

    @property
    def free(self) -> Int[Array, "*layers B"] | None:
        """Slots that are left for later blocks; None for parts that do not grow."""
        return None

    @property
    def read_bytes(self) -> int:
        """Bytes that a decode step reads of it at most; arrays may be shapes."""
        return nbytes(self)

    def layer(self, turn: int) -> Self:
        """One layer's, where the part is that of several."""
        return take(self, turn)

    def settled(self) -> Self:
        """The same in arrays cut to what the data need; not for use under `jit`."""
        return self

    @abc.abstractmethod
    def live_positions(self, turn: int | None = None) -> list[list[np.ndarray]]:
        """Original positions held, per row and KV head; on the host."""

    def grow(
        self,
        tail: "Tail",
        rows: Bool[Array, "B"],
        growth: "Growth",
        spec: LayerSpec,
        turn: Turn = None,
    ) -> Self:
        """Take up one layer's full `tail` of the given rows as one encoded block."""
        raise AssertionError(f"{type(self).__name__} does not grow")

    def whole(self, held: "Slots", spec: LayerSpec) -> "AbstractPart":
        """This part with all that it will ever hold (the parallel form).

        Args:
            held: the same slots, and those of later blocks behind them; decoded.
            spec: of the layer.
        """
        raise AssertionError(f"{type(self).__name__} does not grow")

    def blank(
        self, rows: int, slots: int, growth: "Growth", spec: LayerSpec, dtype: Any
    ) -> "AbstractPart":
        """A part like this one that holds nothing, of other rows, for it to grow.

        Args:
            rows: of the new part.
            slots: of the new part, a multiple of the block.
            growth: how it will grow.
            spec: of the layer.
            dtype: of keys and values.
        """
        raise AssertionError(f"{type(self).__name__} does not grow")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Growth:
    """How full tails move into the body: `block` tokens at a time, by these codecs."""

    block: int
    keys: AbstractCodec
    values: AbstractCodec

    def encode(
        self, tail: "Tail", rows: Bool[Array, "B"], spec: LayerSpec
    ) -> tuple[AbstractEncoded, AbstractEncoded]:
        """Keys and values of the tail as blocks; anything if no row's is full."""

        def run():
            args = (tail.positions >= 0, tail.positions, spec.rope)
            return self.keys.encode(tail.keys, *args), self.values.encode(
                tail.values, *args
            )

        # Only the block is computed on condition: a body that went through the
        # branches would be copied at every step.
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run))
        return jax.lax.cond(jnp.any(rows), run, lambda: blank)


def put_positions(
    old: Array, new: Array, start: Array, rows: Array, turn: Turn = None
) -> Array:
    """Write `new [B, K, R]` into `old [B, K, S]` from slot `start` on, where `rows`."""
    return put_block(old[..., None], new[..., None], start, rows, turn)[..., 0]


def by_head(positions: Int[Array, "B K S"]) -> list[list[np.ndarray]]:
    """Live entries of `[B, K, S]` positions as lists over rows and heads."""
    return [[head[head >= 0] for head in row] for row in np.asarray(positions)]


def served(q: Array, keys: AbstractEncoded, values: AbstractEncoded) -> bool:
    """Whether `decode_attention` serves these queries and codecs."""
    few = q.shape[2] <= MOST_QUERIES
    return few and keys.stored is not None and values.stored is not None


def attend_stored(
    q: Array,
    q_positions: Array,
    keys: AbstractEncoded,
    values: AbstractEncoded,
    positions: Array,
    spec: LayerSpec,
    lengths: Int[Array, "B K"],
    offsets: Int[Array, "B K+1"] | None = None,
    turn: Turn = None,
) -> Partial:
    """Attention by the kernel that reads keys and values as they are stored."""
    k, v = keys.stored, values.stored
    assert k is not None and v is not None  # `served` says so
    return decode_attention(
        q,
        flat(k, turn),
        flat(v, turn),
        lengths,
        offsets=offsets,
        positions=flat(positions, turn),
        q_positions=q_positions,
        row=row_of(turn, q.shape[0]),
        scale=spec.scale,
        window=spec.window,
        softcap=spec.softcap,
    )


@final
@pytree
class Slots(AbstractPart):
    """The same capacity for every head: `[B, K, S, D]`.

    Invariants:
      * a slot is free iff `positions == EMPTY`, and may then hold anything;
      * within one (row, head) live positions are distinct.

    A part that takes up blocks of later tokens (`grow`) counts in `filled` the slots
    that are taken; the next block starts there.
    """

    keys: AbstractEncoded
    values: AbstractEncoded
    positions: Int[Array, "*layers B K S"]
    filled: Int[Array, "*layers B"] | None = None

    def attend(self, q, q_positions, spec, limit=None, turn=None):
        if limit is None and served(q, self.keys, self.values):
            slot = jnp.arange(1, self.positions.shape[-1] + 1)
            positions = take(self.positions, turn)
            held = jnp.max(jnp.where(positions >= 0, slot, 0), axis=-1)
            body = (self.keys, self.values, self.positions)
            return attend_stored(q, q_positions, *body, spec, held, turn=turn)
        return attend_blocks(
            q, q_positions, self.keys, self.values, self.positions, spec, limit, turn
        )

    def settled(self):
        held = {"keys": self.keys.settled(), "values": self.values.settled()}
        return dataclasses.replace(self, **held)

    @property
    def free(self):
        return None if self.filled is None else self.positions.shape[-1] - self.filled

    def live_positions(self, turn=None):
        return by_head(take(self.positions, turn))

    def blank(self, rows, slots, growth, spec, dtype):
        layers, kv_heads = self.positions.shape[:-3], self.positions.shape[-2]
        nothing = jnp.zeros((rows, kv_heads, slots, spec.head_dim), dtype)
        free = jnp.full(nothing.shape[:-1], EMPTY, jnp.int32)
        how = (nothing, free >= 0, free, spec.rope)
        part = Slots(
            keys=growth.keys.encode(*how),
            values=growth.values.encode(*how),
            positions=free,
            filled=jnp.zeros((rows,), jnp.int32),
        )
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (*layers, *x.shape)), part)

    def grow(self, tail, rows, growth, spec, turn=None):
        assert self.filled is not None
        keys, values = growth.encode(tail, rows, spec)
        filled = take(self.filled, turn)
        start = jnp.minimum(filled, self.positions.shape[-1] - growth.block)
        at = (start, rows, turn)
        return Slots(
            keys=self.keys.put(keys, *at),
            values=self.values.put(values, *at),
            positions=put_positions(self.positions, tail.positions, *at),
            filled=put(self.filled, filled + jnp.where(rows, growth.block, 0), turn),
        )

    def whole(self, held, spec):
        del spec
        return held


@final
@pytree
class KeysOnly(AbstractPart):
    """Tokens whose values were dropped: they weigh in the softmax, with one value.

    `rest [B, K, D]` is the mean of the dropped values and stands for each of them.
    """

    keys: AbstractEncoded
    rest: Float[Array, "*layers B K D"]
    positions: Int[Array, "*layers B K S"]

    def attend(self, q, q_positions, spec, limit=None, turn=None):
        del limit
        return take(self, turn)._attend(q, q_positions, spec)

    def _attend(self, q, q_positions, spec):
        b, h, t, d = q.shape
        kv_heads, s = self.positions.shape[1:]
        live = (self.positions >= 0)[..., None]
        decoded = self.keys.decode(self.positions, spec.rope)
        logits = slot_logits(
            q, jnp.where(live, decoded, 0), scale=spec.scale, softcap=spec.softcap
        )
        mask = slot_mask(q_positions, self.positions, spec.window)[:, :, None]
        ones = jnp.ones((s, 1), jnp.float32)
        lse = softmax_partial(logits, mask, ones).lse.reshape(b, h, t)
        rest = jnp.repeat(self.rest.astype(jnp.float32), h // kv_heads, axis=1)
        seen = (lse > NEG_INF)[..., None]
        return Partial(jnp.where(seen, rest[:, :, None, :], 0.0), lse)

    def live_positions(self, turn=None):
        return by_head(take(self.positions, turn))
