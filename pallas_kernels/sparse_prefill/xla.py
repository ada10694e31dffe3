"""Plain XLA in O(S) memory: a scan over query blocks, each gathers what it reads.

Per query block the entries that some query can see come first, and a loop with a
dynamic end takes them a few at a time: work follows the counts, not the capacity.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.pallas_kernels.dense import LOGITS_BUDGET
from kvjax.pallas_kernels.partial import Partial, cap
from kvjax.pallas_kernels.sparse_prefill.args import SparseArgs
from kvjax.pallas_kernels.sparse_prefill.gradient import with_gradient
from kvjax.pallas_kernels.sparse_prefill.layout import Layout, layout
from kvjax.pallas_kernels.sparse_prefill.patterns import kv_blocks
from kvjax.types import NEG_INF

COLUMNS = 1024
"""Keys that a query block takes at a time: the product is large, its logits are not."""


class _Call:
    """What one call needs at every query block; arrays closed over by the loops."""

    def __init__(self, args: SparseArgs):
        self.lay: Layout = layout(args.q, args.k, args.pattern)
        self.pattern, self.rules = args.pattern, args.rules
        self.q_start, self.kv_len = args.q_start, args.kv_len
        lay, stored = self.lay, (args.k, args.v)
        self.keys, self.values = (self.blocks(lay.pad_keys(x)) for x in stored)
        budget = LOGITS_BUDGET // (lay.batch * lay.heads * lay.block_q * lay.block_k)
        wanted = max(1, min(budget, COLUMNS // lay.block_k))
        self.chunk = min(wanted, lay.capacity)
        heads = jnp.arange(lay.lists) // lay.group
        self.place = (jnp.arange(lay.batch)[:, None, None], heads[None, :, None])

    def blocks(self, x: Array) -> Array:
        """`[B, K, S, D]` to `[B, K, kv_blocks, block_k, D]`."""
        lay = self.lay
        return x.reshape(*x.shape[:2], lay.kv_blocks, lay.block_k, lay.dim)

    def by_query_block(self, x: Float[Array, "B H T D"]) -> Array:
        """To `[q_blocks, B, lists, rows * block_q, D]`, any last axis."""
        lay, last = self.lay, x.shape[-1]
        pad = lay.q_blocks * lay.block_q - lay.tokens
        x = jnp.pad(x, [(0, 0), (0, 0), (0, pad), (0, 0)])
        shape = (lay.batch, lay.lists, lay.rows, lay.q_blocks, lay.block_q, last)
        x = jnp.moveaxis(x.reshape(shape), 3, 0)
        return x.reshape(lay.q_blocks, lay.batch, lay.lists, -1, last)

    def join(self, x: Array) -> Array:
        """The reverse of `by_query_block`."""
        lay, last = self.lay, x.shape[-1]
        shape = (lay.q_blocks, lay.batch, lay.lists, lay.rows, lay.block_q, last)
        return lay.join_queries(jnp.moveaxis(x.reshape(shape), 0, 3))

    def first_query(self, i: Array) -> Int[Array, "B"]:
        """Position of the first query of block `i`."""
        return self.q_start + i * self.lay.block_q

    def entries(self, i: Array) -> tuple[Int[Array, "B L C"], Int[Array, "B L"]]:
        """The KV blocks that query block `i` reads, in front, and their number."""
        lay = self.lay
        index, used = kv_blocks(self.pattern, i, self.q_start)
        first = self.first_query(i)[:, None, None]
        length = self.kv_len[:, None, None]
        start = index * lay.block_k
        used &= (index >= 0) & (index < lay.kv_blocks)
        used &= self.rules.touches(first, lay.block_q, start, lay.block_k, length)
        order = jnp.argsort(~used, axis=-1, stable=True)
        index = jnp.take_along_axis(jnp.where(used, index, 0), order, axis=-1)
        count = jnp.sum(used, axis=-1, dtype=jnp.int32)
        pad = -lay.capacity % self.chunk
        index = jnp.pad(index, [(0, 0), (0, 0), (0, pad)])
        shape = (lay.batch, lay.lists)
        index = jnp.broadcast_to(index, (*shape, index.shape[-1]))
        return index, jnp.broadcast_to(count, shape)

    def loop(self, i: Array, body: Callable[..., Any], carry: Any) -> Any:
        """Run `body(index, mask, carry)` over the entries of query block `i`."""
        index, count = self.entries(i)
        steps = -(-jnp.max(count) // self.chunk)

        def step(n, carry):
            offset = n * self.chunk
            some = jax.lax.dynamic_slice_in_dim(index, offset, self.chunk, axis=2)
            used = offset + jnp.arange(self.chunk) < count[..., None]
            return body(some, self.mask(i, some, used), carry)

        return jax.lax.fori_loop(0, steps, step, carry)

    def mask(
        self, i: Array, index: Int[Array, "B L C"], used: Bool[Array, "B L C"]
    ) -> Bool[Array, "B L 1 Tq Ck"]:
        """What the queries of block `i` see of the blocks `index`."""
        lay = self.lay
        k = index[..., None] * lay.block_k + jnp.arange(lay.block_k)
        k = jnp.where(used[..., None], k, jnp.iinfo(jnp.int32).max)
        k = k.reshape(lay.batch, lay.lists, 1, 1, -1)
        q = self.first_query(i)[:, None] + jnp.arange(lay.block_q)
        length = self.kv_len[:, None, None, None, None]
        return self.rules.visible(q[:, None, None, :, None], k, length)

    def take(self, blocks: Array, index: Int[Array, "B L C"]) -> Array:
        """Listed blocks `[B, L, C * block_k, D]`, free slots as they are."""
        lay = self.lay
        found = blocks[(*self.place, index)]
        return found.reshape(lay.batch, lay.lists, -1, lay.dim)

    def take_cleared(self, blocks: Array, index: Int[Array, "B L C"]) -> Array:
        """`take`, with zeros in free slots: 0 times NaN is NaN."""
        lay = self.lay
        found = blocks[(*self.place, index)]
        position = index[..., None] * lay.block_k + jnp.arange(lay.block_k)
        live = position < self.kv_len[:, None, None, None]
        found = jnp.where(live[..., None], found, 0)
        return found.reshape(lay.batch, lay.lists, -1, lay.dim)

    def by_row(self, x: Array) -> Array:
        """`[B, L, rows * block_q, C]` to `[B, L, rows, block_q, C]` and so the mask."""
        lay = self.lay
        return x.reshape(lay.batch, lay.lists, lay.rows, lay.block_q, -1)


def _product(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _forward(args: SparseArgs, how: None) -> Partial:
    del how
    call, rules = _Call(args), args.rules

    def block(_, xs):
        i, queries = xs

        def body(index, mask, carry):
            peak, total, out = carry
            keys = call.take(call.keys, index)
            values = call.take_cleared(call.values, index)
            logits = _product("BLTD,BLSD->BLTS", queries, keys) * rules.scale
            logits = call.by_row(cap(logits, rules.softcap))
            logits = jnp.where(mask, logits, NEG_INF).reshape(*queries.shape[:3], -1)
            top = jnp.maximum(peak, jnp.max(logits, axis=-1))
            anchor = jnp.where(jnp.isneginf(top), 0.0, top)  # -inf - -inf is NaN
            weight = jnp.exp(logits - anchor[..., None])
            shrink = jnp.exp(peak - anchor)
            more = _product("BLTS,BLSD->BLTD", weight.astype(args.v.dtype), values)
            total = total * shrink + jnp.sum(weight, axis=-1)
            return top, total, out * shrink[..., None] + more

        zero = jnp.zeros(queries.shape[:3], jnp.float32)
        start = (zero + NEG_INF, zero, jnp.zeros(queries.shape, jnp.float32))
        peak, total, out = call.loop(i, body, start)
        seen = total > 0
        safe = jnp.where(seen, total, 1.0)
        lse = jnp.where(seen, peak + jnp.log(safe), NEG_INF)
        return None, (out / safe[..., None], lse[..., None])

    xs = (jnp.arange(call.lay.q_blocks, dtype=jnp.int32), call.by_query_block(args.q))
    _, (out, lse) = jax.lax.scan(block, None, xs)
    return Partial(call.join(out), call.join(lse)[..., 0])


def backward(
    args: SparseArgs, d_out, lse, delta, how: None
) -> tuple[Array, Array, Array]:
    """Gradients in the same order of blocks; `dk` and `dv` gather by scatter-adds."""
    del how
    call, rules = _Call(args), args.rules
    lay = call.lay

    def block(carry, xs):
        i, queries, d_rows, lse_rows, delta_rows = xs

        def body(index, mask, carry):
            dq, dk, dv = carry
            keys = call.take_cleared(call.keys, index)
            values = call.take_cleared(call.values, index)
            logits = _product("BLTD,BLSD->BLTS", queries, keys) * rules.scale
            capped = cap(logits, rules.softcap)
            weight = jnp.exp(capped - lse_rows)
            slope = weight * (_product("BLTD,BLSD->BLTS", d_rows, values) - delta_rows)
            if rules.softcap is not None:
                slope = slope * (1.0 - jnp.square(capped / rules.softcap))
            weight, slope = (
                jnp.where(mask, call.by_row(x), 0).reshape(x.shape).astype(args.q.dtype)
                for x in (weight, slope * rules.scale)
            )
            dq = dq + _product("BLTS,BLSD->BLTD", slope, keys)
            to = (*call.place, index)
            shape = (lay.batch, lay.lists, call.chunk, lay.block_k, lay.dim)
            more = _product("BLTS,BLTD->BLSD", slope, queries).reshape(shape)
            dk = dk.at[to].add(more)
            more = _product("BLTS,BLTD->BLSD", weight, d_rows).reshape(shape)
            dv = dv.at[to].add(more)
            return dq, dk, dv

        zero = jnp.zeros(queries.shape, jnp.float32)
        dq, dk, dv = call.loop(i, body, (zero, *carry))
        return (dk, dv), dq

    rows = (args.q, d_out, lse[..., None], delta[..., None])
    xs = (jnp.arange(lay.q_blocks, dtype=jnp.int32), *map(call.by_query_block, rows))
    zero = jnp.zeros(call.keys.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(block, (zero, zero), xs)
    dk, dv = (x.reshape(*x.shape[:2], -1, lay.dim)[:, :, : lay.slots] for x in (dk, dv))
    return call.join(dq), dk, dv


_attend = with_gradient(_forward, backward)


def sparse_prefill(args: SparseArgs) -> Partial:
    """The public function's XLA path; temporaries are linear in T and S."""
    return _attend(args, None)
