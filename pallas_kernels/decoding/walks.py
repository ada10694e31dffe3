"""Where the slots of a head lie: in one piece, or in listed pages; static.

Both name the slots of a head by consecutive numbers, its list. `span` says which it
holds, `pieces` where the copy engine finds those of a block, `place` where one lies.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kvjax.pallas_kernels.decoding.program import BLOCK


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """Slots `start` to `stop` of `[B, K, S]`, or of `[B, S]` if ragged.

    Main memory: `start` and `stop`, `[B, K]`; with `lead`, `[1]`, row `b` of the
    queries reads row `lead + b` of the store.

    Attributes:
        heads: KV heads.
        slots: of the store, `S`.
        ragged: heads share one axis.
        block: slots per step.
        align: what the first slot of the first block is a multiple of.
    """

    heads: int
    slots: int
    ragged: bool
    block: int = BLOCK
    align: int = BLOCK

    @property
    def piece(self) -> int:
        """Slots per copy."""
        return self.block

    def stored(self, far: Any, row: Any) -> Any:
        """Row of the store that a row of queries reads."""
        return row + far["lead"][0] if "lead" in far else row

    def span(self, far: Any, row: Any, head: Any) -> tuple[Any, Any, Any]:
        """First slot of the first block, and the slots held: from, to."""
        start, stop = far["start"][row, head], far["stop"][row, head]
        return lax.div(start, self.align) * self.align, start, stop

    def pieces(self, far: Any, row: Any, head: Any, begin: Any) -> list[Any]:
        """Per copy of a block: `group -> index` of its slots, in steps of `group`."""
        row = self.stored(far, row)

        def index(group):
            # Tiles of shared memory want to know that they are met whole.
            at = pl.multiple_of(begin, 8) if group == 1 else lax.div(begin, group)
            some = pl.ds(at, self.block // group)
            return (row, some) if self.ragged else (row, head, some)

        return [index]

    def place(self, ops: Any, far: Any, words: Any, slot: Any) -> tuple[Any, Any]:
        """Where slot `slot` lies in the store, and in a list of weights.

        `words` are the row of the store and the head.
        """
        del far
        last = ops.word(self.slots - 1)
        slot = ops.choose(ops.less(slot, last), slot, last)
        row, head = words
        lead = row
        if not self.ragged:
            lead = ops.add(ops.mul(row, ops.word(self.heads)), head)
        at = ops.add(ops.mul(lead, ops.word(self.slots)), slot)
        return at, at


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pages:
    """Pages of `[N, page]` that a table `[B, K, entries]` lists.

    Main memory: `table`, and `counts`, `[B, K]`.

    Attributes:
        heads: KV heads.
        entries: of the table, whole blocks.
        page: slots of a page.
        block: slots per step.
    """

    heads: int
    entries: int
    page: int
    block: int = BLOCK

    @property
    def piece(self) -> int:
        """Slots per copy."""
        return self.page

    def stored(self, far: Any, row: Any) -> Any:
        """The row itself: pages lie anywhere."""
        del far
        return row

    def span(self, far: Any, row: Any, head: Any) -> tuple[Any, Any, Any]:
        """First slot of the first block, and the slots held: from, to."""
        zero = jnp.int32(0)
        return zero, zero, far["counts"][row, head] * self.page

    def pieces(self, far: Any, row: Any, head: Any, begin: Any) -> list[Any]:
        """For each copy of a block: `group -> index` of its page."""
        first = lax.div(begin, self.page)
        found = []
        for one in range(self.block // self.page):
            at = far["table"][row, head, first + one]
            found.append(lambda group, at=at: (at,))
        return found

    def place(self, ops: Any, far: Any, words: Any, slot: Any) -> tuple[Any, Any]:
        """Where slot `slot` lies in the store, and in a list of weights.

        `words` are the row of the store and the head.
        """
        row, head = words
        lead = ops.add(ops.mul(row, ops.word(self.heads)), head)
        entry = ops.right(slot, self.page.bit_length() - 1)
        at = ops.add(ops.mul(lead, ops.word(self.entries)), entry)
        (page,) = ops.fetch(far["table"], at, 1, 32)
        inside = ops.low(slot, self.page - 1)
        listed = ops.add(ops.mul(lead, ops.word(self.entries * self.page)), slot)
        return ops.add(ops.mul(page, ops.word(self.page)), inside), listed
