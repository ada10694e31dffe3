"""Diagonals of scattered positions, on chips whose kernel needs them in line.

A branch of a program takes its memory whether or not it runs, so this one goes query
by query and head by head: slow, and small.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.pallas_kernels.column_stats import xla
from kvjax.pallas_kernels.column_stats.args import ColumnArgs
from kvjax.pallas_kernels.column_stats.stats import ColumnStats


def column_stats(args: ColumnArgs) -> ColumnStats:
    """See `api.column_stats`, with `slash`."""
    (b, h, t, _), (kv_heads, s) = args.q.shape, args.keys.shape[1:3]
    groups = h // kv_heads

    def of_head(x):
        keys, q, weights, lse = x
        zero = jnp.zeros((b, groups, s), jnp.float32)

        def step(total, i):
            def one(x, axis):
                return jax.lax.dynamic_slice_in_dim(x, i, 1, axis)

            some = dataclasses.replace(
                args,
                q=one(q, 2),
                keys=keys[:, None],
                q_positions=one(args.q_positions, 1),
                weights=one(weights, 2),
                lse=None if lse is None else one(lse, 2),
            )
            found = xla.column_stats(some)
            highest = jnp.maximum(total.max, found.max)
            sums, along = total.sum + found.sum, total.slash + found.slash
            return ColumnStats(sums, highest, along), None

        return jax.lax.scan(step, ColumnStats(zero, zero, zero), jnp.arange(t))[0]

    def by_head(x):
        return jnp.moveaxis(x.reshape(b, kv_heads, groups, *x.shape[2:]), 1, 0)

    heads = (jnp.moveaxis(args.keys, 1, 0), by_head(args.q), by_head(args.factors))
    lse = None if args.lse is None else by_head(args.lse)
    found = jax.lax.map(of_head, (*heads, lse))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(b, h, s), found)
