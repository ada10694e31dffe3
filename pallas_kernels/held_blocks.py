"""The blocks of `held_attention`: one block of logits at a time, forward and backward.

Blocks take whole rows while these fit, and parts of one row's queries where they do
not. Nothing here knows where a row or a prefix of it stands.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kvjax.pallas_kernels import dispatch
from kvjax.pallas_kernels.dense import visible
from kvjax.pallas_kernels.partial import cap, row_sum
from kvjax.types import EMPTY, NEG_INF, pytree, static

BLOCK = 1 << 26
"""Logits of one block (elements) on one device."""

CPU_BLOCK = 1 << 19
"""The same on a CPU: what fits beside its gradient into a core's caches."""

QUERIES = 16
"""Queries of a block at least."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
    """How logits are made of products."""

    scale: float
    window: int | None
    softcap: float | None


@pytree
class Queries:
    """A block of `n` queries."""

    q: Array  # [r, K, G, n, D]
    positions: Array  # [r, n]
    behind: Array | None  # [r, n]
    edge: Array | None  # [r, n]


@pytree
class StoredBlock:
    """The same keys as a cache holds them."""

    k: Array  # [r, K, s, D]
    v: Array  # [r, K, s, D]
    slot: Array  # [r, K, s]


@pytree
class KeyBlock:
    """The `s` keys that a block of queries may see."""

    k: Array  # [r, K, s, D]
    v: Array  # [r, K, s, D]
    positions: Array  # [r, s]
    early: Array | None  # [r, s]
    kept: Array | None  # [r, K, s]
    stored: StoredBlock | None
    choice: bool = static()  # whether the choice gets a gradient


@pytree
class Slopes:
    """Gradients of what a block of keys holds, in float32."""

    k: Array  # [r, K, s, D]
    v: Array  # [r, K, s, D]
    stored: tuple[Array, Array] | None = None  # [r, K, s, D] each
    soft: Array | None = None  # [r, K, s]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """How much is done at a time.

    Attributes:
        logits: elements of a block, over all devices.
        all_rows: a block takes part of the queries of all rows, which several devices
            hold between them: one after the other, all would wait for one.
    """

    logits: int
    all_rows: bool


def on_platform(fn: Callable[..., Any], *args: Any) -> Any:
    """`fn(block, *args)` with the block of the platform that it is compiled for."""
    devices = dispatch.partitions()

    def of(logits: int) -> Callable[..., Any]:
        return functools.partial(
            fn, Block(logits=logits * devices, all_rows=devices > 1)
        )

    return jax.lax.platform_dependent(*args, cpu=of(CPU_BLOCK), default=of(BLOCK))


def _sizes(block: Block, queries: Queries, keys: KeyBlock) -> tuple[int, int]:
    """Rows and queries per block: whole rows while they fit, else parts of one."""
    b, kv_heads, groups, n, _ = queries.q.shape
    per_query = kv_heads * groups * keys.k.shape[2]
    if block.all_rows:
        return b, max(QUERIES, min(n, block.logits // (b * per_query)))
    fit = block.logits // (per_query * n)
    if fit < 1:
        return 1, max(QUERIES, min(n, block.logits // per_query))
    return max(rows for rows in range(1, b + 1) if b % rows == 0 and rows <= fit), n


def _by_rows(rows: int, fn: Callable[[Any], Any], tree: Any) -> Any:
    """`fn` over groups of `rows` rows, one after the other."""
    batch = jax.tree.leaves(tree)[0].shape[0]
    if batch == rows:
        return fn(tree)
    split = jax.tree.map(lambda a: a.reshape(batch // rows, rows, *a.shape[1:]), tree)
    found = jax.lax.map(fn, split)
    return jax.tree.map(lambda a: a.reshape(batch, *a.shape[2:]), found)


def _chunks(queries: Any, n: int, size: int, axes: Any) -> Any:
    """Leaves with their query axis cut in pieces of `size`, which come first."""
    count = -(-n // size)

    def cut(x: Array, axis: int) -> Array:
        fill = EMPTY if jnp.issubdtype(x.dtype, jnp.integer) else 0
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, count * size - n)
        x = jnp.pad(x, pad, constant_values=fill)
        shape = (*x.shape[:axis], count, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    return jax.tree.map(cut, queries, axes)


def _whole(x: Array, n: int, axis: int) -> Array:
    """Pieces `[count, ..., size, ...]` joined along `axis`, cut to `n`."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, n, axis=axis)


def _query_axes(queries: Queries) -> Any:
    """The axis of the queries in every leaf."""
    return jax.tree.map(lambda a: 3 if a.ndim == 5 else 1, queries)


def forward(how: How, block: Block, given: tuple[Queries, KeyBlock]):
    """Output `[B, K, G, n, D]` and log-sum-exp `[B, K, G, n]` of a part."""
    rows, size = _sizes(block, *given)
    n = given[0].q.shape[3]

    def one(group: tuple[Queries, KeyBlock]):
        queries, keys = group
        if size >= n:
            return _block_forward(how, queries, keys)
        pieces = _chunks(queries, n, size, _query_axes(queries))
        out, lse = jax.lax.map(lambda piece: _block_forward(how, piece, keys), pieces)
        return _whole(out, n, 3), _whole(lse, n, 3)

    return _by_rows(rows, one, given)


def backward(how: How, block: Block, given, rest):
    """Slopes of the queries `[B, K, G, n, D]` and of the keys of a part."""
    rows, size = _sizes(block, *given)
    n = given[0].q.shape[3]

    def one(group):
        (queries, keys), more = group
        if size >= n:
            return _block_backward(how, queries, keys, *more)
        axes = (_query_axes(queries), jax.tree.map(lambda _: 3, more))
        pieces = _chunks((queries, more), n, size, axes)
        first = jax.tree.map(lambda a: a[0], pieces)
        shapes = jax.eval_shape(
            lambda p: _block_backward(how, p[0], keys, *p[1]), first
        )
        zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes[1])

        def step(total, piece):
            d_q, slopes = _block_backward(how, piece[0], keys, *piece[1])
            return jax.tree.map(jnp.add, total, slopes), d_q

        slopes, d_q = jax.lax.scan(step, zero, pieces)
        return _whole(d_q, n, 3), slopes

    return _by_rows(rows, one, (given, rest))


class _Pairs(NamedTuple):
    """Masks `[r, K or 1, 1, n, s]` over pairs of a query and a key."""

    seen: Array
    stored: Array | None  # seen, and as it is stored
    choice: Array | None  # the choice decides whether it is seen


def _pairs(how: How, queries: Queries, keys: KeyBlock) -> _Pairs:
    seen = visible(queries.positions, keys.positions, how.window)[:, None, None]
    if keys.kept is None:
        return _Pairs(seen, None, None)
    assert queries.behind is not None and keys.early is not None
    crossing = queries.behind[:, :, None] & keys.early[:, None, :]
    crossing = crossing[:, None, None]
    choice = seen & crossing if keys.choice else None
    seen = seen & (keys.kept[:, :, None, None, :] | ~crossing)
    if keys.stored is None:
        return _Pairs(seen, None, choice)
    assert queries.edge is not None
    below = keys.stored.slot[:, :, None, None, :] < queries.edge[:, None, None, :, None]
    return _Pairs(seen, seen & below, choice)


def _scores(how: How, queries: Queries, keys: KeyBlock, pairs: _Pairs) -> Array:
    """Scaled, capped logits `[r, K, G, n, s]`, of the key that each pair reads."""
    stored = None if keys.stored is None else keys.stored.k
    logits = _of_either(pairs, queries.q, keys.k, stored)
    return cap(logits * how.scale, how.softcap)


def _of_either(
    pairs: _Pairs, queries: Array, plain: Array, stored: Array | None
) -> Array:
    """Products of each query with a key, as it was or as it is stored."""
    found = _by_key(queries, plain)
    if stored is None:
        return found
    assert pairs.stored is not None
    return jnp.where(pairs.stored, _by_key(queries, stored), found)


def _by_key(queries: Array, keys: Array) -> Array:
    """`[r, K, G, n, D]` and `[r, K, s, D]` to `[r, K, G, n, s]`."""
    return _product("RKXD,RKSD->RKXS", queries, keys)


def _by_channel(pairs: Array, keys: Array) -> Array:
    """`[r, K, G, n, s]` and `[r, K, s, D]` to `[r, K, G, n, D]`."""
    return _product("RKXS,RKSD->RKXD", pairs, keys)


def _product(sum_of: str, x: Array, keys: Array) -> Array:
    """One GEMM per KV head: the queries of its group are rows of one matrix."""
    r, kv_heads, groups, n, _ = x.shape
    rows = x.astype(keys.dtype).reshape(r, kv_heads, groups * n, -1)
    found = jnp.einsum(sum_of, rows, keys, preferred_element_type=jnp.float32)
    return found.reshape(r, kv_heads, groups, n, -1)


def _gathered(pairs: Array, queries: Array) -> Array:
    """`[r, K, G, n, s]` and `[r, K, G, n, D]` to `[r, K, s, D]`."""
    r, kv_heads, groups, n, _ = pairs.shape
    shape = (r, kv_heads, groups * n, -1)
    pairs, queries = (x.astype(queries.dtype).reshape(shape) for x in (pairs, queries))
    # Channels first: XLA's CPU product of this form takes a third of the other's time.
    found = jnp.einsum(
        "RKXD,RKXS->RKDS", queries, pairs, preferred_element_type=jnp.float32
    )
    return jnp.swapaxes(found, 2, 3)


def _block_forward(how: How, queries: Queries, keys: KeyBlock) -> tuple[Array, Array]:
    pairs = _pairs(how, queries, keys)
    logits = jnp.where(pairs.seen, _scores(how, queries, keys, pairs), NEG_INF)
    peak = jnp.max(logits, axis=-1, keepdims=True)
    anchor = jnp.where(jnp.isneginf(peak), 0.0, peak)
    weight = jnp.exp(logits - anchor)
    total = row_sum(weight)[..., None]
    safe = jnp.where(total > 0, total, 1.0)
    if keys.stored is None:
        out = _by_channel(weight, keys.v)
    else:
        stored, plain = _sides(pairs, weight)
        out = _by_channel(plain, keys.v) + _by_channel(stored, keys.stored.v)
    lse = jnp.where(total > 0, anchor + jnp.log(safe), NEG_INF)
    return out / safe, lse[..., 0]


def _block_backward(
    how: How, queries: Queries, keys: KeyBlock, slope: Array, lse: Array, delta: Array
) -> tuple[Array, Slopes]:
    pairs = _pairs(how, queries, keys)
    logits = _scores(how, queries, keys, pairs)
    anchor = jnp.where(jnp.isneginf(lse), 0.0, lse)[..., None]
    share = jnp.where(pairs.seen, jnp.exp(logits - anchor), 0.0)
    stored_v = None if keys.stored is None else keys.stored.v
    moved = _of_either(pairs, slope, keys.v, stored_v)
    moved = moved - delta[..., None]  # what more weight of a pair does to the loss
    d_logits = share * moved * how.scale
    if how.softcap is not None:
        d_logits = d_logits * (1.0 - jnp.square(logits / how.softcap))
    soft = None
    if pairs.choice is not None:
        heard = pairs.choice & ~jnp.isneginf(lse)[..., None]
        would = jnp.where(pairs.seen, share, jax.nn.sigmoid(logits - anchor))
        soft = jnp.sum(jnp.where(heard, would * moved, 0.0), axis=(2, 3))
    if keys.stored is None:
        k, v = _gathered(d_logits, queries.q), _gathered(share, slope)
        return _by_channel(d_logits, keys.k), Slopes(k=k, v=v, soft=soft)
    (d_stored, d_plain), (stored, plain) = (_sides(pairs, x) for x in (d_logits, share))
    d_q = _by_channel(d_stored, keys.stored.k) + _by_channel(d_plain, keys.k)
    return d_q, Slopes(
        k=_gathered(d_plain, queries.q),
        v=_gathered(plain, slope),
        stored=(_gathered(d_stored, queries.q), _gathered(stored, slope)),
        soft=soft,
    )


def _sides(pairs: _Pairs, x: Array) -> tuple[Array, Array]:
    """`x` of the pairs that read what is stored, and of the others."""
    assert pairs.stored is not None
    return jnp.where(pairs.stored, x, 0.0), jnp.where(pairs.stored, 0.0, x)
