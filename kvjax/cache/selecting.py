"""Parts of which every query reads what it chooses: selection, gather, attention."""

import abc
import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.parts import AbstractPart, Slots, by_head, put_positions
from kvjax.codecs import AbstractEncoded
from kvjax.codecs.base import put_block
from kvjax.pallas_kernels.paged_decode import paged_decode
from kvjax.pallas_kernels.partial import Partial
from kvjax.pallas_kernels.slots import attend_block, slot_mask
from kvjax.turns import Turn, put, take
from kvjax.types import LayerSpec, nbytes, static

LANES = 128
"""Numbers side by side in the registers of a TPU."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractSelecting(AbstractPart):
    """Tokens of which each query reads, per KV head, the pages that it chooses.

    `page` slots are read as one.
    Everything goes by `positions`; the slots of a row are taken from the first on,
    `filled` of them, later blocks behind those of the prompt. What is read is found
    before it is fetched, by the numbers of pages: keys and values may lie in the host's
    memory.
    """

    keys: AbstractEncoded
    values: AbstractEncoded
    positions: Int[Array, "*layers B K S"]
    filled: Int[Array, "*layers B"]
    page: int = static()

    SUMMARY: ClassVar[tuple[str, ...]] = ()
    """Fields that say what is in the slots; leaves `[*layers, B, K, X, C]`, each entry
    of as many slots."""

    @abc.abstractmethod
    def select(
        self,
        q: Float[Array, "B H T D"],
        q_positions: Int[Array, "B T"],
        spec: LayerSpec,
        limit: Int[Array, "B T"] | None = None,
        turn: Turn = None,
    ) -> tuple[Int[Array, "B K T C"], Bool[Array, "B K T C"]]:
        """Pages of each KV head for every query, and which of them it reads.

        Arguments are those of `attend`. None is read twice. Of a page that is read,
        slots may still be free, or out of the query's sight.
        """

    @abc.abstractmethod
    def summary(
        self,
        keys: Float[Array, "B K S D"],
        values: Float[Array, "B K S D"],
        positions: Int[Array, "B K S"],
    ) -> dict[str, Array]:
        """`SUMMARY` of slots by themselves: whole blocks, decoded."""

    @property
    @abc.abstractmethod
    def most(self) -> int:
        """The most pages that a query reads."""

    @property
    def free(self):
        return self.positions.shape[-1] - self.filled

    @property
    def read_bytes(self):
        whole, pages = nbytes((self.keys, self.values)), self.slots // self.page
        return nbytes(self) - whole + -(-whole * self.most // pages)

    @property
    def slots(self) -> int:
        """Slots of a head."""
        return int(self.positions.shape[-1])

    def live_positions(self, turn=None):
        return by_head(take(self.positions, turn))

    def seen(
        self,
        first: Int[Array, "B K X"],
        last: Int[Array, "B K X"],
        q_positions: Int[Array, "B T"],
        limit: Int[Array, "B T"] | None,
        spec: LayerSpec,
    ) -> Bool[Array, "B K T X"]:
        """Which entries a query sees something of.

        Args:
            first: oldest position of each entry of the summary, `NEVER` if it is empty.
            last: newest one.
            q_positions: of the queries.
            limit: see `attend`.
            spec: of the layer.
        """
        asked = q_positions[:, None, :, None]
        seen = first[:, :, None] <= asked
        if spec.window is not None:  # what is behind it takes no place from the others
            seen = seen & (last[:, :, None] > asked - spec.window)
        if limit is not None:
            each = self.positions.shape[-1] // first.shape[-1]
            end = (jnp.arange(first.shape[-1]) + 1) * each
            seen = seen & (end <= limit[:, None, :, None])
        return seen

    def held(self, limit: Int[Array, "B T"] | None, turn: Turn) -> Int[Array, "B X"]:
        """Slots that are taken, for every query or (`X` = 1) for all."""
        return take(self.filled, turn)[:, None] if limit is None else limit

    def attend(self, q, q_positions, spec, limit=None, turn=None):
        chosen = self.select(q, q_positions, spec, limit, turn)
        return self.attend_chosen(q, q_positions, chosen, spec, turn)

    def chosen(
        self,
        q: Float[Array, "B H T D"],
        q_positions: Int[Array, "B T"],
        spec: LayerSpec,
        limit: Int[Array, "B T"] | None = None,
        turn: Turn = None,
    ) -> Bool[Array, "B K T S"]:
        """Slots that each query reads; arguments are those of `attend`."""
        chosen = self.select(q, q_positions, spec, limit, turn)
        return self._mask(q_positions, chosen, take(self.positions, turn), spec)

    def attend_chosen(
        self, q: Array, q_positions: Array, chosen: tuple[Array, Array], spec, turn
    ) -> Partial:
        """Attention over the pages that `select` chose."""
        index, read = chosen
        if q.shape[2] > 1:
            return take(self, turn)._attend_masked(q, q_positions, chosen, spec)
        index, read = index[:, :, 0], read[:, :, 0]
        rest = (q, q_positions, index, read, spec)
        if turn is None or q.shape[-1] % LANES == 0:
            return self._attend_pages(*rest, turn)
        # Narrower pages lie otherwise in a TPU's memory than they are read, and one
        # layer's are moved for less than those of all.
        return jax.lax.platform_dependent(
            tpu=lambda: take(self, turn)._attend_pages(*rest, None),
            default=lambda: self._attend_pages(*rest, turn),
        )

    def _attend_pages(
        self, q: Array, q_positions: Array, index: Array, read: Array, spec, turn: Turn
    ) -> Partial:
        """One query token per row: its pages, and nothing else."""
        positions = take(self.positions, turn)
        b, kv_heads, s = positions.shape
        each = s // self.page
        paged = positions.reshape(b, kv_heads, each, self.page)
        here = jnp.take_along_axis(paged, index[..., None], axis=2)
        here = here.reshape(b, kv_heads, -1)
        seen = slot_mask(q_positions, here, spec.window)[:, :, 0]
        seen = seen & jnp.repeat(read, self.page, axis=-1)
        k, v = self.keys.stored, self.values.stored
        how: dict[str, Any] = {"scale": spec.scale, "softcap": spec.softcap}
        if k is None or v is None:  # codes that no kernel reads: of these pages alone
            k, v = (
                side.pages(index, self.page, turn).decode(here, spec.rope)
                for side in (self.keys, self.values)
            )
            return attend_block(q, k, v, seen[:, :, None], **how)
        row = jnp.arange(b) if turn is None else turn * b + jnp.arange(b)
        first = (row[:, None] * kv_heads + jnp.arange(kv_heads)) * each
        place = jnp.arange(1, index.shape[-1] + 1)
        return paged_decode(
            q,
            self._pool(k),
            self._pool(v),
            first[..., None] + index,
            jnp.max(jnp.where(read, place, 0), axis=-1),  # none behind are read
            bias=jnp.where(seen, 0.0, -jnp.inf),
            **how,
        )

    def _pool[T](self, side: T) -> T:
        """All layers', rows' and heads' pages in one line, `[B * K * S / P, P, D]`."""
        slots = self.positions.shape[-1]

        def paged(x: Array) -> Array:
            rows = x.shape[-2] * self.page // slots  # slots of a page, or their groups
            return x.reshape(-1, rows, x.shape[-1])

        return jax.tree.map(paged, side)

    def _mask(self, q_positions, chosen, positions, spec) -> Bool[Array, "B K T S"]:
        """Slots that are chosen, and that the query sees."""
        index, read = chosen
        b, kv_heads, s = positions.shape
        t, pages = index.shape[2], s // self.page
        at = jnp.where(read, index, pages)  # dropped
        lead = jnp.indices((b, kv_heads, t, 1), sparse=True)[:3]
        mask = jnp.zeros((b, kv_heads, t, pages), jnp.bool_)
        mask = mask.at[(*lead, at)].set(True, mode="drop")
        mask = jnp.repeat(mask, self.page, axis=-1)
        return slot_mask(q_positions, positions, spec.window) & mask

    def _attend_masked(self, q, q_positions, chosen, spec) -> Partial:
        """Several query tokens, each with its own pages: masks instead of gathers."""
        return attend_block(
            q,
            self.keys.decode(self.positions, spec.rope),
            self.values.decode(self.positions, spec.rope),
            self._mask(q_positions, chosen, self.positions, spec),
            scale=spec.scale,
            softcap=spec.softcap,
        )

    def blank(self, rows, slots, growth, spec, dtype):
        held = Slots(keys=self.keys, values=self.values, positions=self.positions)
        held = held.blank(rows, slots, growth, spec, dtype)
        assert held.filled is not None
        width = self.positions.shape[-1]

        def nothing(x: Array) -> Array:
            entries = slots // (width // x.shape[-2])
            lead = (*held.positions.shape[:-1], entries, x.shape[-1])
            return jnp.zeros(lead, x.dtype)

        return dataclasses.replace(
            self,
            keys=held.keys,
            values=held.values,
            positions=held.positions,
            filled=held.filled,
            **{name: nothing(getattr(self, name)) for name in self.SUMMARY},
        )

    def grow(self, tail, rows, growth, spec, turn=None):
        keys, values = growth.encode(tail, rows, spec)
        filled, slots = take(self.filled, turn), self.positions.shape[-1]
        start = jnp.minimum(filled, slots - growth.block)
        # Of what is read, as the prompt's is.
        decoded = [x.decode(tail.positions, spec.rope) for x in (keys, values)]
        new = self.summary(decoded[0], decoded[1], tail.positions)
        at = (start, rows, turn)

        def written(name: str) -> Array:
            old = getattr(self, name)
            entry = start // (slots // old.shape[-2])
            return put_block(old, new[name], entry, rows, turn)

        return dataclasses.replace(
            self,
            keys=self.keys.put(keys, *at),
            values=self.values.put(values, *at),
            positions=put_positions(self.positions, tail.positions, *at),
            filled=put(self.filled, filled + jnp.where(rows, growth.block, 0), turn),
            **{name: written(name) for name in self.SUMMARY},
        )

    def whole(self, held: Slots, spec: LayerSpec) -> Self:
        keys, values = (
            x.decode(held.positions, spec.rope) for x in (held.keys, held.values)
        )
        new = self.summary(keys, values, held.positions)

        def joined(name: str) -> Array:
            old, late = getattr(self, name), new[name]
            unit = self.positions.shape[-1] // old.shape[-2]
            pad = [(0, 0)] * old.ndim
            pad[-2] = (0, late.shape[-2] - old.shape[-2])
            mine = jnp.arange(late.shape[-2]) * unit < self.filled[:, None]
            return jnp.where(mine[:, None, :, None], jnp.pad(old, pad), late)

        return dataclasses.replace(
            self,
            keys=held.keys,
            values=held.values,
            positions=held.positions,
            **{name: joined(name) for name in self.SUMMARY},
        )
