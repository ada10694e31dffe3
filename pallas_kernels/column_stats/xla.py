"""Column statistics of softmax attention in O(S) memory: the plain XLA path."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.pallas_kernels.column_stats.args import ColumnArgs
from kvjax.pallas_kernels.column_stats.stats import ColumnStats
from kvjax.pallas_kernels.dense import query_chunk, visible
from kvjax.pallas_kernels.partial import cap, row_sum
from kvjax.types import NEG_INF


def column_stats(args: ColumnArgs) -> ColumnStats:
    """See `api.column_stats`; queries go in chunks."""
    q_positions, k_positions = args.q_positions, args.k_positions
    (b, h, t, _), (kv_heads, s) = args.q.shape, args.keys.shape[1:3]
    groups = h // kv_heads
    keys = jnp.where((k_positions >= 0)[:, None, :, None], args.keys, 0)
    q = jnp.where((q_positions >= 0)[:, None, :, None], args.q, 0)
    weights = args.factors
    chunk = query_chunk(t, b * h * s)

    def step(total: ColumnStats, x) -> tuple[ColumnStats, None]:
        queries, positions, factors, *given = x
        queries = queries.reshape(b, kv_heads, groups, chunk, -1)
        logits = jnp.einsum(
            "BKGTD,BKSD->BKGTS", queries, keys, preferred_element_type="f4"
        )
        mask = visible(positions, k_positions, args.window)[:, None, None]
        logits = jnp.where(mask, cap(logits * args.scale, args.softcap), NEG_INF)
        if given:
            peak = given[0].reshape(b, kv_heads, groups, chunk, 1)
        else:
            peak = jnp.max(logits, axis=-1, keepdims=True)
        weight = jnp.exp(logits - jnp.where(jnp.isneginf(peak), 0.0, peak))
        mass = row_sum(weight)
        if given:
            mass = jnp.where(jnp.isneginf(peak[..., 0]), 0.0, 1.0)
        share = jnp.where(mass > 0, 1.0 / jnp.where(mass > 0, mass, 1.0), 0.0)
        weight, share = weight.reshape(b, h, chunk, s), share.reshape(b, h, chunk)
        share = share * factors
        highest = jnp.max(weight * share[..., None], axis=2)
        along = None
        if total.slash is not None:
            rows = weight * share[..., None]
            along = total.slash + _diagonals(rows, positions, k_positions)
        # A product reads the weights once, without a scaled copy of them.
        sums = total.sum + jnp.einsum("BHTS,BHT->BHS", weight, share)
        return ColumnStats(sums, jnp.maximum(total.max, highest), along), None

    rows = (weights,) if args.lse is None else (weights, args.lse)
    xs = _in_chunks(chunk, q, q_positions, *rows)
    zero = jnp.zeros((b, h, s), jnp.float32)
    start = ColumnStats(zero, zero, zero if args.slash else None)
    if chunk >= t:
        return step(start, jax.tree.map(lambda x: x[0], xs))[0]
    return jax.lax.scan(jax.checkpoint(step), start, xs)[0]


def _in_chunks(chunk: int, q: Array, q_positions: Array, *rows: Array):
    """The query axis split, chunks first; padding queries are at -1."""
    count = -(-q.shape[2] // chunk)
    more = (0, count * chunk - q.shape[2])

    def split(x: Array, axis: int, fill: int = 0) -> Array:
        pad = [(0, 0)] * x.ndim
        pad[axis] = more
        x = jnp.pad(x, pad, constant_values=fill)
        shape = (*x.shape[:axis], count, chunk, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    return split(q, 2), split(q_positions, 1, -1), *(split(x, 2) for x in rows)


def _diagonals(
    rows: Float[Array, "B H T S"],
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
) -> Float[Array, "B H S"]:
    """Sums of `rows` by distance, for distances below `S`."""
    s = rows.shape[-1]

    def shifted() -> Array:
        # Keys lie at their positions: a reversed row, cut out at the right place.
        backwards = jnp.pad(jnp.flip(rows, -1), [(0, 0)] * 3 + [(s, s)])
        start = jnp.clip(2 * s - 1 - q_positions, 0, 2 * s)

        def cut(row, at):
            return jax.lax.dynamic_slice_in_dim(row, at, s, axis=-1)

        return jnp.sum(jax.vmap(jax.vmap(cut, (1, 0), 1))(backwards, start), axis=2)

    def scattered() -> Array:
        distance = q_positions[:, :, None] - k_positions[:, None, :]
        inside = (distance >= 0) & (distance < s)
        index = jnp.where(inside, distance, s)

        def one(row, at):
            return jnp.zeros((row.shape[0], s + 1)).at[:, at].add(row)[:, :s]

        return jax.vmap(one)(rows, index)

    in_place = (k_positions < 0) | (k_positions == jnp.arange(s, dtype=jnp.int32))
    return jax.lax.cond(jnp.all(in_place), shifted, scattered)
