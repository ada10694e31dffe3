"""Retrieval at read time: pages with key bounds; a query reads the best ones only."""

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax import exact
from kvjax.cache.parts import AbstractPart, Slots, by_head, put_positions
from kvjax.codecs import AbstractEncoded
from kvjax.codecs.base import put_block
from kvjax.pallas_kernels.page_score import page_score
from kvjax.pallas_kernels.page_summary import page_summary
from kvjax.pallas_kernels.paged_decode import paged_decode
from kvjax.pallas_kernels.partial import Partial
from kvjax.pallas_kernels.slots import attend_block, slot_mask
from kvjax.turns import Turn, flat, put, row_of, take
from kvjax.types import EMPTY, nbytes, pytree, static

LANES = 128
"""Numbers side by side in the registers of a TPU."""


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class PageBudget:
    """How many of the held pages a query reads. Exactly one field is set.

    Attributes:
        keep: fraction of the held pages, rounded up.
        pages: number of pages.
    """

    keep: float | None = None
    pages: int | None = None

    def read(self, held: Int[Array | np.ndarray, "..."]) -> Any:
        """Pages to read of `held` ones, NumPy or traced: at least 1."""
        xp = exact.namespace(held)
        held = xp.maximum(xp.asarray(held, np.int32), 1)
        if self.keep is not None:
            return exact.ceil_share(held, self.keep)
        assert self.pages is not None
        return xp.minimum(held, min(self.pages, exact.LONGEST))


@final
@pytree
class Pages(AbstractPart):
    """All tokens, in pages of `page` slots with channel-wise key bounds.

    Each query token reads, per KV head, the pages with the highest bound on `q . k`
    (the newest page always among them) and nothing else. `budget` says how many.

    Source: Quest (2406.10774) section 3. Deviation: the heads of a GQA group read
    the same pages, ranked by the largest bound in the group.
    """

    keys: AbstractEncoded
    values: AbstractEncoded
    positions: Int[Array, "*layers B K S"]
    low: Float[Array, "*layers B K P D"]
    high: Float[Array, "*layers B K P D"]
    filled: Int[Array, "*layers B"]
    budget: PageBudget = static()
    page: int = static()
    most: int = static()

    def _selected(
        self, q: Array, q_positions: Array, limit: Array | None, turn: Turn
    ) -> tuple[Array, Array]:
        """Page indices `[B, K, T, most]`, best first, and which of them to read."""
        positions = take(self.positions, turn)
        b, kv_heads, s = positions.shape
        first = positions.reshape(b, kv_heads, s // self.page, self.page)
        start = jnp.min(jnp.where(first >= 0, first, jnp.iinfo(jnp.int32).max), axis=-1)
        low, high = flat((self.low, self.high), turn)
        score = page_score(q, low, high, mode="bound", group="max", row=row_of(turn, b))
        seen = start[:, :, None] <= q_positions[:, None, :, None]
        if limit is not None:
            end = (jnp.arange(s // self.page) + 1) * self.page
            seen = seen & (end <= limit[:, None, :, None])
        score = jnp.where(seen, score, -jnp.inf)
        newest = jnp.argmax(jnp.where(seen, start[:, :, None], EMPTY), axis=-1)
        pages = jnp.arange(s // self.page)
        score = jnp.where(seen & (pages == newest[..., None]), jnp.inf, score)
        best, index = jax.lax.top_k(score, self.most)
        held = take(self.filled, turn)[:, None] if limit is None else limit
        allowed = self.budget.read(held // self.page)
        rank = jnp.arange(self.most)
        read = (rank < allowed[:, None, :, None]) & (best > -jnp.inf)
        return index, read

    @property
    def free(self):
        return self.positions.shape[-1] - self.filled

    @property
    def read_bytes(self):
        whole, pages = nbytes((self.keys, self.values)), self.low.shape[-2]
        return nbytes(self) - whole + -(-whole * self.most // pages)

    def attend(self, q, q_positions, spec, limit=None, turn=None):
        index, read = self._selected(q, q_positions, limit, turn)
        if q.shape[2] > 1:
            mine = take(self, turn)
            return mine._attend_masked(q, q_positions, index, read, spec)
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
        row = jnp.arange(b) if turn is None else turn * b + jnp.arange(b)
        first = (row[:, None] * kv_heads + jnp.arange(kv_heads)) * each
        pages = first[..., None] + index
        k, v = self.keys.stored, self.values.stored
        how: dict[str, Any] = {"scale": spec.scale, "softcap": spec.softcap}
        if k is None or v is None:  # codes that no kernel reads: of these pages alone
            k, v = (
                self._picked(side, pages).decode(here, spec.rope)
                for side in (self.keys, self.values)
            )
            mask = seen & jnp.repeat(read, self.page, axis=-1)
            return attend_block(q, k, v, mask[:, :, None], **how)
        return paged_decode(
            q,
            self._pool(k),
            self._pool(v),
            pages,
            jnp.sum(read, axis=-1),  # the best come first
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

    def _picked(
        self, side: AbstractEncoded, pages: Int[Array, "B K C"]
    ) -> AbstractEncoded:
        """Of the line of pages the given ones, as slots of each head."""

        def pick(x: Array) -> Array:
            return x[pages].reshape(*pages.shape[:2], -1, x.shape[-1])

        return jax.tree.map(pick, self._pool(side))

    def _attend_masked(self, q, q_positions, index, read, spec):
        """Several query tokens, each with its own pages: masks instead of gathers."""
        pages = self.low.shape[2]
        chosen = jax.nn.one_hot(index, pages, dtype=jnp.bool_) & read[..., None]
        chosen = jnp.repeat(jnp.any(chosen, axis=-2), self.page, axis=-1)
        return attend_block(
            q,
            self.keys.decode(self.positions, spec.rope),
            self.values.decode(self.positions, spec.rope),
            slot_mask(q_positions, self.positions, spec.window) & chosen,
            scale=spec.scale,
            softcap=spec.softcap,
        )

    def live_positions(self, turn=None):
        return by_head(take(self.positions, turn))

    def blank(self, rows, slots, growth, spec, dtype):
        held = Slots(keys=self.keys, values=self.values, positions=self.positions)
        held = held.blank(rows, slots, growth, spec, dtype)
        pages = slots // self.page
        shape = (*held.positions.shape[:-1], pages, spec.head_dim)
        return Pages(
            keys=held.keys,
            values=held.values,
            positions=held.positions,
            low=jnp.zeros(shape, self.low.dtype),
            high=jnp.zeros(shape, self.high.dtype),
            filled=held.filled,
            budget=self.budget,
            page=self.page,
            most=int(self.budget.read(np.array(pages))),
        )

    def grow(self, tail, rows, growth, spec, turn=None):
        live = tail.positions >= 0
        keys, values = growth.encode(tail, rows, spec)
        filled = take(self.filled, turn)
        start = jnp.minimum(filled, self.positions.shape[-1] - growth.block)
        # Bounds of what is read, as those of the prompt's pages are.
        decoded = keys.decode(tail.positions, spec.rope)
        low, high, _ = page_summary(decoded, live, page=self.page)
        at = start // self.page
        return Pages(
            keys=self.keys.put(keys, start, rows, turn),
            values=self.values.put(values, start, rows, turn),
            positions=put_positions(self.positions, tail.positions, start, rows, turn),
            low=put_block(self.low, low, at, rows, turn),
            high=put_block(self.high, high, at, rows, turn),
            budget=self.budget,
            filled=put(self.filled, filled + jnp.where(rows, growth.block, 0), turn),
            page=self.page,
            most=self.most,
        )
