"""What a sparse pattern has chosen, and attention over it: the one place that computes.

Patterns say which pairs of blocks, which diagonals of blocks and which columns are
seen. Everything else costs nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention import self_attention
from kvjax.pallas_kernels.dense import map_query_chunks, query_chunk
from kvjax.pallas_kernels.partial import Partial
from kvjax.pallas_kernels.slots import attend_block, slot_mask
from kvjax.pallas_kernels.sparse_prefill import (
    BlockList,
    Diagonals,
    Pattern,
    sparse_prefill,
)
from kvjax.types import EMPTY, LayerInputs, Lengths, pytree, static


@pytree
class Chosen:
    """The keys that queries see, of those before them, inside a layer's window.

    A pair is seen if its blocks are listed, by `blocks` or by `diagonals`, or if its
    key is one of the columns. `Hx` is `H`, or 1 where all heads see the same. What is
    said of blocks behind a row's last token, or of blocks that lie later than the
    query's, does not matter.

    Attributes:
        blocks: `[B or 1, Hx, N, N]`, query block by key block; None: no map.
        diagonals: `[B, Hx, N]` by query block - key block; None: none.
        columns: `[B, Hx, S]` keys that all later queries see; None: none.
        block: queries and keys per block; block 0 starts with the row.
        most: no query block lists more blocks; None: all `N` may be.
        most_columns: no head has more columns.
    """

    blocks: Bool[Array, "B1 Hx N N"] | None = None
    diagonals: Bool[Array, "B Hx N"] | None = None
    columns: Bool[Array, "B Hx S"] | None = None
    block: int = static()
    most: int | None = static(default=None)
    most_columns: int = static(default=0)

    def rows(self, q_blocks: Int[Array, "B T"], count: int) -> Bool[Array, "B Hx T N"]:
        """Which of the first `count` key blocks queries of these blocks are listed.

        Args:
            q_blocks: block of each query; what comes of a negative one is arbitrary.
            count: key blocks.
        """
        found, at = [], jnp.maximum(q_blocks, 0)
        if self.blocks is not None:
            (_, lists, _, n), rows = self.blocks.shape, at.shape[0]
            blocks = jnp.broadcast_to(self.blocks, (rows, lists, n, n))
            index = jnp.broadcast_to(at[:, None], (rows, lists, at.shape[1]))
            found.append(jnp.take_along_axis(blocks, index[..., None], axis=2))
        if self.diagonals is not None:
            (rows, lists, n), wide = self.diagonals.shape, self.diagonals
            offset = at[:, None, :, None] - jnp.arange(n)
            index = jnp.broadcast_to(offset, (rows, lists, at.shape[1], n))
            index = index.reshape(rows, lists, -1)
            held = jnp.take_along_axis(wide, jnp.clip(index, 0, n - 1), axis=2)
            found.append(held.reshape(rows, lists, -1, n) & (offset >= 0))
        listed = found[0] if len(found) == 1 else found[0] | found[1]
        return listed[..., :count]

    def map(self, rows: int, count: int) -> Bool[Array, "B Hx N N"]:
        """All that is listed, query block by key block, of `rows` rows."""
        at = jnp.broadcast_to(jnp.arange(count), (rows, count))
        return self.rows(at, count)

    def listed(self, inputs: LayerInputs) -> Pattern:
        """What `sparse_prefill` is to compute."""
        rows, tokens = inputs.positions.shape
        n = -(-tokens // self.block)
        most = n if self.most is None else max(1, min(n, self.most))
        if self.blocks is None:
            assert self.diagonals is not None
            entries, counts = _in_front(self.diagonals[..., :n], most)
            return Diagonals(offsets=entries, counts=counts, block=self.block)
        earlier = jnp.arange(n) <= jnp.arange(n)[:, None]
        entries, counts = _in_front(self.map(rows, n) & earlier, most)
        return BlockList(
            index=entries, counts=counts, block_q=self.block, block_k=self.block
        )

    def parts(self, inputs: LayerInputs) -> list[Partial]:
        """Attention over blocks and over columns, each by itself.

        Args:
            inputs: with positions from 0, and zeros in padding.
        """
        spec = inputs.spec
        part = sparse_prefill(
            inputs.q,
            inputs.k,
            inputs.v,
            self.listed(inputs),
            kv_len=jnp.sum(inputs.positions >= 0, axis=-1, dtype=jnp.int32),
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap,
        )
        parts = [Partial(part.out.astype(jnp.float32), part.lse)]
        return parts if self.columns is None else [*parts, self._columns(inputs)]

    def _columns(self, inputs: LayerInputs) -> Partial:
        """Attention over the columns, where no listed block covers them."""
        spec, (b, h, tokens, _) = inputs.spec, inputs.q.shape
        assert self.columns is not None
        columns = jnp.broadcast_to(self.columns, (b, h, tokens))
        count = max(1, min(tokens, self.most_columns))
        index = jnp.argsort(~columns, axis=-1, stable=True)[..., :count]
        kept = jnp.take_along_axis(columns, index, axis=-1)
        at = jnp.where(kept, index, EMPTY)  # [B, H, V]
        row = jnp.arange(b)[:, None, None]
        head = (jnp.arange(h) // spec.groups)[:, None]
        k, v = (x[row, head, index] for x in (inputs.k, inputs.v))
        block_of = jnp.broadcast_to(index // self.block, (b, h, count))[:, :, None]
        n = -(-tokens // self.block)

        def read(q: Array, q_positions: Array) -> tuple[Partial, tuple[()]]:
            rows = self.rows(q_positions // self.block, n)
            rows = jnp.broadcast_to(rows, (b, h, *rows.shape[2:]))
            place = jnp.broadcast_to(block_of, (b, h, rows.shape[2], count))
            covered = jnp.take_along_axis(rows, place, axis=-1)
            mask = slot_mask(q_positions, at, spec.window) & ~covered
            how = {"scale": spec.scale, "softcap": spec.softcap}
            return attend_block(jnp.moveaxis(q, 2, 1), k, v, mask, **how), ()

        chunk = query_chunk(tokens, b * h * count)
        queries = jnp.moveaxis(inputs.q, 1, 2)
        return map_query_chunks(read, chunk, queries, inputs.positions)[0]

    def masked(self, inputs: LayerInputs, mass: bool, past: Partial | None):
        """The same by a mask over dense attention: what each key received comes along.

        Args:
            inputs: as in `parts`.
            mass: whether that is wanted.
            past: attention of the same queries over tokens in front of these.
        """

        def allowed(q_positions: Array, k_positions: Array) -> Array:
            s = k_positions.shape[1]
            rows = self.rows(q_positions // self.block, -(-s // self.block))
            seen = jnp.repeat(rows, self.block, axis=-1)[..., :s]
            if self.columns is None:
                return seen
            return seen | self.columns[:, :, None, :s]

        return self_attention(inputs, allowed=allowed, mass=mass, past=past)

    def share(self, inputs: LayerInputs) -> Float[Array, "B H"]:
        """Of the blocks that full attention computes, the part that this does.

        A column of a block that is not listed is `1 / block` of a block.
        """
        (b, h, tokens, _), block = inputs.q.shape, self.block
        n = -(-tokens // block)
        lengths = jnp.sum(inputs.positions >= 0, axis=-1, dtype=jnp.int32)
        seen = visible_blocks(lengths, n, block, inputs.spec.window)
        cost = self.map(b, n).astype(jnp.float32)
        if self.columns is not None:
            pad = [(0, 0), (0, 0), (0, n * block - tokens)]
            some = jnp.pad(self.columns, pad).reshape(b, -1, n, block)
            cost += (1 - cost) * jnp.mean(some, axis=-1, dtype=jnp.float32)[:, :, None]
        computed = jnp.sum(jnp.where(seen, cost, 0), axis=(2, 3))
        whole = jnp.maximum(jnp.sum(seen, axis=(2, 3), dtype=jnp.float32), 1)
        return jnp.broadcast_to(computed / whole, (b, h))


def _in_front(
    kept: Bool[Array, "*lead N"], most: int
) -> tuple[Int[Array, "*lead C"], Int[Array, "*lead"]]:
    """Where what is kept lies, in order, and how much there is.

    `sparse_prefill` looks at no other entry.
    """
    entries = jnp.argsort(~kept, axis=-1, stable=True)[..., :most]
    return entries.astype(jnp.int32), jnp.sum(kept, axis=-1, dtype=jnp.int32)


def visible_blocks(
    lengths: Lengths, count: int, block: int, window: int | None
) -> Bool[Array, "B 1 N N"]:
    """Pairs of blocks of which some token sees some other.

    Args:
        lengths: tokens of each row.
        count: blocks of a row.
        block: tokens per block.
        window: sliding window in tokens, or None.
    """
    start = jnp.arange(count) * block
    q, k = start[:, None], start
    seen = (k <= q) & (q < lengths[:, None, None])
    if window is not None:
        seen = seen & (q - (k + block - 1) < window)
    return seen[:, None]


def own(inputs: LayerInputs) -> LayerInputs:
    """`inputs` with positions from 0, whatever is in front, and zeros in padding.

    What padding holds must not reach a gradient.
    """
    live = inputs.positions >= 0
    index = jnp.arange(live.shape[1], dtype=jnp.int32)
    q, k, v = (
        jnp.where(live[:, None, :, None], x, 0) for x in (inputs.q, inputs.k, inputs.v)
    )
    positions = jnp.where(live, index, EMPTY)
    return dataclasses.replace(inputs, q=q, k=k, v=v, positions=positions)


def of_rows(inputs: LayerInputs, rows: Bool[Array, "B"]) -> LayerInputs:
    """`inputs` in which all other rows are empty."""
    positions = jnp.where(rows[:, None], inputs.positions, EMPTY)
    return dataclasses.replace(inputs, positions=positions)


def first_tokens(inputs: LayerInputs, count: int) -> LayerInputs:
    """The first `count` tokens of every row."""
    cut = {name: getattr(inputs, name)[:, :, :count] for name in ("q", "k", "v")}
    return dataclasses.replace(inputs, positions=inputs.positions[:, :count], **cut)


def unchosen(inputs: LayerInputs) -> LayerInputs:
    """`inputs` for a choice, which is no function to differentiate."""
    return jax.lax.stop_gradient(inputs)
