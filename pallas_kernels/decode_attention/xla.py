"""`decode_attention` in plain XLA: loops as long as what is held, O(block) memory.

Slots: a loop over blocks of all heads together, up to the longest head. Ragged: a loop
over the blocks of every head in turn, so that its length is the sum of the lengths.
Each step slices, clears and decodes one block, which stays in a CPU's cache. The loops
end where the data say, so there is no reverse-mode gradient here; see `api`.

One query per row over plain slots is another matter on a CPU: a cleared copy costs
three times the products that it protects, so they run over the slots as they are,
unless the products tell that a free slot holds NaN or an infinity.

Rows of a stack of layers are sliced block by block too, so that no copy of a layer
exists; only where a layer is a block or two it is sliced as a whole.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.pallas_kernels import stacked
from kvjax.pallas_kernels.decode_attention.args import DecodeArgs
from kvjax.pallas_kernels.partial import Partial, cap, merge, softmax_partial
from kvjax.pallas_kernels.quantize_pack import dequantize
from kvjax.pallas_kernels.quantized import Quantized
from kvjax.types import NEG_INF

BLOCK = 1024
"""Slots per step, of all heads together or of one."""

WHOLE = 2 * BLOCK
"""Slots of a layer that are sliced out of its stack at once, uncleared."""


def decode_attention(args: DecodeArgs) -> Partial:
    """See `api.decode_attention`."""
    q, kv_heads = args.q, args.lengths.shape[1]
    b, h, t, d = q.shape
    queries = q.reshape(b, kv_heads, h // kv_heads * t, d)
    stored = args.keys, args.values, args.positions
    whole = t == 1 and not any(isinstance(x, Quantized) for x in stored[:2])
    if args.offsets is not None:
        part = _ragged(args, queries)
    elif whole:
        if args.keys.shape[-2] <= WHOLE:
            keys, values, positions = stacked.rows(stored, args.row, b)
            args = dataclasses.replace(
                args, keys=keys, values=values, positions=positions, row=None
            )
        part = _uncleared(args, queries)
    else:
        part = _slots(args, queries)
    return Partial(part.out.reshape(q.shape), part.lse.reshape(q.shape[:-1]))


def _uncleared(args, queries):
    """One query per row over plain slots, cleared only where that is needed."""

    def cleared():
        return _slots(args, queries)

    def checked():
        if args.row is not None:
            part, finite = _blocks(args, queries, block=WHOLE, clear=False)
            return jax.lax.cond(finite, lambda: part, cleared)
        held = jnp.arange(args.keys.shape[-2]) < args.lengths[..., None]
        seen, _ = _seen(args, queries.shape[2], held, args.positions, args.q_positions)
        logits = _logits(args, queries, args.keys)
        part = softmax_partial(logits, seen, args.values)
        # One array each: a sum is NaN or infinite where one of its terms is.
        finite = jnp.isfinite(jnp.sum(logits)) & jnp.isfinite(jnp.sum(part.out))
        return jax.lax.cond(finite, lambda: part, cleared)

    return jax.lax.platform_dependent(cpu=checked, default=cleared)


def _slots(args, queries):
    """All heads together, block by block up to the longest."""
    return _blocks(args, queries, block=_block(args), clear=True)[0]


def _blocks(args, queries, *, block, clear):
    """`_slots`, and whether what it summed is finite; slots cleared first or not."""
    lengths, positions, slots = args.lengths, args.positions, args.keys.shape[-2]
    rows = None if args.row is None else (args.row, queries.shape[0])

    def step(j, state):
        done, total = state
        # The last block may overlap the one before: its slots count once.
        begin = j * block
        at = jnp.minimum(begin, slots - block)
        slot = at + jnp.arange(block)
        held = (slot >= begin) & (slot < lengths[..., None])
        here = None if positions is None else _slice(positions, at, block, 2, rows)
        k, v = (_block_of(x, at, block, rows) for x in (args.keys, args.values))
        if clear:
            part = _attend(args, queries, k, v, held, here, args.q_positions)
            return merge([done, part]), total
        seen, _ = _seen(args, queries.shape[2], held, here, args.q_positions)
        logits = _logits(args, queries, k)
        assert not isinstance(v, Quantized)
        part = softmax_partial(logits, seen, v)
        # NaN or infinite where one of its terms is.
        total = total + jnp.sum(logits) + jnp.sum(part.out)
        return merge([done, part]), total

    longest = jnp.minimum(jnp.max(lengths), slots)
    start = _nothing(queries), jnp.zeros(())
    part, total = jax.lax.fori_loop(0, -(-longest // block), step, start)
    return part, jnp.isfinite(total)


def _ragged(args, queries):
    """One head after the other, each as long as it is."""
    (b, kv_heads), slots = args.lengths.shape, args.keys.shape[-2]
    row, positions, q_positions = args.row, args.positions, args.q_positions
    block, multiple = _block(args), _multiple(args)
    start = args.offsets[:, :-1].reshape(-1)
    stop = jnp.minimum(start + args.lengths.reshape(-1), slots)
    first = start // multiple * multiple
    count = jnp.where(stop > start, -(-(stop - first) // block), 0)
    edges = jnp.cumsum(count)

    def step(item, done):
        head = jnp.sum(edges <= item)  # of all rows' heads
        query_row = head // kv_heads
        stored_row = query_row if row is None else row + query_row
        rows = (stored_row, 1)
        begin = first[head] + (item - edges[head] + count[head]) * block
        at = jnp.minimum(begin, slots - block)
        slot = at + jnp.arange(block)
        held = (slot >= jnp.maximum(begin, start[head])) & (slot < stop[head])

        def one(x, axis=0):
            return jax.lax.dynamic_slice_in_dim(x, query_row, 1, axis)

        here = None
        if positions is not None:
            here = _slice(positions, at, block, 1, rows)[:, None]
        k, v = (
            jax.tree.map(lambda x: x[:, None], _block_of(x, at, block, rows))
            for x in (args.keys, args.values)
        )
        query = jax.lax.dynamic_slice_in_dim(flat, head, 1, 0)[None]
        now = None if q_positions is None else one(q_positions)
        part = _attend(args, query, k, v, held[None, None], here, now)
        old = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, head, 1, 0), done)
        new = merge([old, jax.tree.map(lambda x: x[0], part)])
        return jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, head, 0), done, new
        )

    flat = queries.reshape(b * kv_heads, *queries.shape[2:])
    return jax.lax.fori_loop(0, edges[-1], step, _nothing(flat))


def _attend(args, queries, keys, values, held, positions, q_positions):
    """Attention of `[B, K, X, D]` over one block, `[B, K, block, D]`."""
    seen, live = _seen(args, queries.shape[2], held, positions, q_positions)
    k, v = (_decode(x, live, queries.dtype) for x in (keys, values))
    return softmax_partial(_logits(args, queries, k), seen, v)


def _seen(args, rows, held, positions, q_positions):
    """What each of `rows` queries sees, `[B, K, X, S]`, and what any does."""
    if positions is None:
        seen, live = held[:, :, None], held
    else:
        at, now = positions[:, :, None, :], q_positions[:, None, :, None]
        seen = held[:, :, None] & (at >= 0) & (at <= now)
        if args.window is not None:
            seen = seen & (now - at < args.window)
        live = jnp.any(seen, axis=2)
        seen = jnp.tile(seen, (1, 1, rows // now.shape[2], 1))
    return jnp.broadcast_to(seen, (*held.shape[:2], rows, held.shape[-1])), live


def _logits(args, queries, keys):
    logits = jnp.einsum(
        "BKXD,BKSD->BKXS", queries.astype(keys.dtype), keys, preferred_element_type="f4"
    )
    return cap(logits * args.scale, args.softcap)


def _decode(side, live, dtype):
    """A block in the dtype of its products, zero where nobody looks."""
    if isinstance(side, Quantized):
        side = dequantize(side, dtype)
    side = side.astype(jnp.promote_types(dtype, side.dtype))
    return jnp.where(live[..., None], side, jnp.zeros((), side.dtype))


def _block_of(side, at, block, rows):
    """`block` slots of keys or values from slot `at` on; `rows` as in `_slice`."""
    if not isinstance(side, Quantized):
        return _slice(side, at, block, side.ndim - 2, rows)
    fine = side.group if side.axis == "channel" else 1

    def cut(x, group):
        if x is None:
            return None
        return _slice(x, at // group, block // group, x.ndim - 2, rows)

    return dataclasses.replace(
        side,
        codes=cut(side.codes, 1),
        scale=cut(side.scale, fine),
        zero=cut(side.zero, fine),
    )


def _slice(x, at, size, axis, rows):
    """`size` entries of an axis from `at` on; of all rows, or (first, how many)."""
    starts: list[Any] = [0] * x.ndim
    sizes = list(x.shape)
    starts[axis], sizes[axis] = at, size
    if rows is not None:
        starts[0], sizes[0] = rows
    return jax.lax.dynamic_slice(x, starts, sizes)


def _multiple(args) -> int:
    """What starts of blocks must be a multiple of."""
    coded = [x for x in (args.keys, args.values) if isinstance(x, Quantized)]
    return max([1, *(x.group for x in coded if x.axis == "channel")])


def _block(args) -> int:
    """Slots per step; all of them where they are few."""
    multiple = _multiple(args)
    return min(args.keys.shape[-2], max(multiple, BLOCK // multiple * multiple))


def _nothing(queries):
    shape = queries.shape
    return Partial(jnp.zeros(shape), jnp.full(shape[:-1], NEG_INF))
