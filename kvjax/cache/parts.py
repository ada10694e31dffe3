"""Parts of a layer's cache: each holds tokens in one layout and attends by itself."""

import abc
import dataclasses
import math
from typing import TYPE_CHECKING, Self, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.blocks import BLOCK, attend_blocks, over_blocks
from kvjax.codecs import AbstractCodec, AbstractEncoded, PlainArray
from kvjax.pallas_kernels.decode_attention import decode_attention
from kvjax.pallas_kernels.decode_attention.api import MOST_QUERIES
from kvjax.pallas_kernels.partial import Partial, cap, softmax_partial
from kvjax.pallas_kernels.slots import slot_logits, slot_mask
from kvjax.types import EMPTY, NEG_INF, LayerSpec, pytree

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
    ) -> Partial:
        """Attention over the live slots of this part; `out` and `lse` in float32.

        Args:
            q: queries after RoPE.
            q_positions: their absolute positions; -1 sees nothing.
            spec: the layer.
            limit: slots that each query may see, from the first; None: all. Only
                parts that grow heed it (the parallel form holds their later blocks).
        """

    @property
    def free(self) -> Int[Array, "B"] | None:
        """Slots that are left for later blocks; None for parts that do not grow."""
        return None

    @abc.abstractmethod
    def live_positions(self) -> list[list[np.ndarray]]:
        """Original positions held, per row and KV head; on the host."""

    def grow(
        self, tail: "Tail", rows: Bool[Array, "B"], growth: "Growth", spec: LayerSpec
    ) -> Self:
        """Take up the full tail of the given rows as one encoded block."""
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


def put_positions(old: Array, new: Array, start: Array, rows: Array) -> Array:
    """Write `new [B, K, R]` into `old [B, K, S]` from slot `start` on, where `rows`."""
    return (
        PlainArray(data=old[..., None])
        .put(PlainArray(data=new[..., None]), start, rows)
        .data[..., 0]
    )


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
    part: "Slots | Ragged",
    spec: LayerSpec,
    lengths: Int[Array, "B K"],
    offsets: Int[Array, "B K+1"] | None = None,
) -> Partial:
    """Attention by the kernel that reads keys and values as they are stored."""
    keys, values = part.keys.stored, part.values.stored
    assert keys is not None and values is not None
    return decode_attention(
        q,
        keys,
        values,
        lengths,
        offsets=offsets,
        positions=part.positions,
        q_positions=q_positions,
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
    positions: Int[Array, "B K S"]
    filled: Int[Array, "B"] | None = None

    def attend(self, q, q_positions, spec, limit=None):
        if limit is None and served(q, self.keys, self.values):
            slot = jnp.arange(1, self.positions.shape[-1] + 1)
            held = jnp.max(jnp.where(self.positions >= 0, slot, 0), axis=-1)
            return attend_stored(q, q_positions, self, spec, held)
        return attend_blocks(
            q, q_positions, self.keys, self.values, self.positions, spec, limit
        )

    @property
    def free(self):
        return None if self.filled is None else self.positions.shape[-1] - self.filled

    def live_positions(self):
        return by_head(self.positions)

    def grow(self, tail, rows, growth, spec):
        assert self.filled is not None
        keys, values = growth.encode(tail, rows, spec)
        start = jnp.minimum(self.filled, self.positions.shape[-1] - growth.block)
        return Slots(
            keys=self.keys.put(keys, start, rows),
            values=self.values.put(values, start, rows),
            positions=put_positions(self.positions, tail.positions, start, rows),
            filled=self.filled + jnp.where(rows, growth.block, 0),
        )


@final
@pytree
class KeysOnly(AbstractPart):
    """Tokens whose values were dropped: they weigh in the softmax, with one value.

    `rest [B, K, D]` is the mean of the dropped values and stands for each of them.
    """

    keys: AbstractEncoded
    rest: Float[Array, "B K D"]
    positions: Int[Array, "B K S"]

    def attend(self, q, q_positions, spec, limit=None):
        del limit
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

    def live_positions(self):
        return by_head(self.positions)


@final
@pytree
class Ragged(AbstractPart):
    """One flat buffer for all heads of a layer: `[B, N, D]`.

    Head `k` owns the slots `offsets[b, k] .. offsets[b, k + 1]`. How many that is
    depends on the data, but their sum does not: head-wise budgets free memory.
    """

    keys: AbstractEncoded
    values: AbstractEncoded
    positions: Int[Array, "B N"]
    offsets: Int[Array, "B K+1"]

    @property
    def heads(self) -> Int[Array, "B N"]:
        """KV head of every slot (slots past the last offset: the last head)."""
        index = jnp.arange(self.positions.shape[-1])[None, :, None]
        owner = jnp.sum(index >= self.offsets[:, None, 1:], axis=-1)
        return jnp.minimum(owner, self.offsets.shape[-1] - 2)

    def attend(self, q, q_positions, spec, limit=None):
        del limit
        if served(q, self.keys, self.values):
            held = self.offsets[:, 1:] - self.offsets[:, :-1]
            return attend_stored(q, q_positions, self, spec, held, self.offsets)
        heads = self.heads

        def attend(start, width: int) -> Partial:
            at = (start, width, 1)
            here = jax.lax.dynamic_slice_in_dim(self.positions, *at)
            live = (here >= 0)[..., None]
            held = (part.block(start, width) for part in (self.keys, self.values))
            keys, values = (jnp.where(live, x.decode(here, spec.rope), 0) for x in held)
            owner = jax.lax.dynamic_slice_in_dim(heads, *at)
            return self._attend(q, q_positions, spec, keys, values, here, owner)

        # A flat slot is one head's: blocks of as many bytes as elsewhere.
        block = BLOCK * (self.offsets.shape[-1] - 1)
        multiple = math.lcm(self.keys.block_multiple, self.values.block_multiple)
        slots = self.positions.shape[-1]
        return over_blocks(attend, slots, multiple, q.shape, block)

    def _attend(self, q, q_positions, spec, keys, values, positions, owner):
        """Attention over some slots, the free ones cleared."""
        # All heads' queries against the flat buffer, masked to the owner: one GEMM
        # per row. The buffer is read once; the extra products are cheap beside it.
        kv_heads = self.offsets.shape[-1] - 1
        own = owner[:, None, :] == jnp.arange(kv_heads)[None, :, None]
        flat = jnp.where(own, positions[:, None, :], EMPTY)  # [B, K, N]
        (b, h, t, d), n = q.shape, positions.shape[-1]
        rows = q.reshape(b, h * t, d).astype(keys.dtype)
        logits = jnp.einsum("BXD,BND->BXN", rows, keys, preferred_element_type="f4")
        logits = cap(logits.reshape(b, kv_heads, -1, t, n) * spec.scale, spec.softcap)
        mask = slot_mask(q_positions, flat, spec.window)[:, :, None]
        mask = jnp.broadcast_to(mask, logits.shape)
        part = softmax_partial(
            logits.reshape(b, h * t, n), mask.reshape(b, h * t, n), values
        )
        return Partial(part.out.reshape(b, h, t, d), part.lse.reshape(b, h, t))

    def live_positions(self):
        positions, offsets = np.asarray(self.positions), np.asarray(self.offsets)
        rows = []
        for held, edge in zip(positions, offsets, strict=True):
            heads = [held[a:b] for a, b in zip(edge[:-1], edge[1:], strict=True)]
            rows.append([head[head >= 0] for head in heads])
        return rows
