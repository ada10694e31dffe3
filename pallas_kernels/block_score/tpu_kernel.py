"""Body of the TPU kernel of `block_score`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from kvjax.pallas_kernels.block_score import regroup

LOW = -1e30
"""Stands for -inf in running maxima: differences of it stay numbers."""


def kernel(
    q_ref,  # [1, 1, G, tile_q * vectors, J * D / vectors]
    k_ref,  # [1, 1, tile_k * vectors, J * D / vectors]
    out_ref,  # [1, 1, G, tile_q / per_q, S / block_k]
    peak_ref,  # [G, tile_q, 1]
    mass_ref,  # [G, tile_q, 1]
    sums_ref,  # [G, steps, tile_q, tile_k / per_k]
    queries_ref,  # [G, tile_q, J * D]
    keys_ref,  # [resident tiles and one for the others, tile_k, J * D]
    *,
    plan: Any,
):
    """One tile: scores of its groups, and their sums per key block."""
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        peak_ref[...] = jnp.full_like(peak_ref, LOW)
        mass_ref[...] = jnp.zeros_like(mass_ref)
        sums_ref[...] = jnp.zeros_like(sums_ref)
        left = (plan.rows - i * plan.tile_q) * plan.vectors
        for head in range(q_ref.shape[2]):
            regroup.groups(
                q_ref.at[0, 0, head], queries_ref.at[head], plan.vectors, left, True
            )

    slot = jnp.minimum(j, plan.resident)

    @pl.when((i == 0) | ((j >= plan.resident) & (j <= plan.last_step(i))))
    def _():
        left = (plan.columns - j * plan.tile_k) * plan.vectors
        regroup.groups(k_ref.at[0, 0], keys_ref.at[slot], plan.vectors, left, False)

    @pl.when(j <= plan.last_step(i))
    def _():
        seen = _seen(i, j, plan)
        for head in range(q_ref.shape[2]):
            logits = jnp.where(
                seen, _logits(queries_ref, keys_ref, head, slot, plan), LOW
            )
            before = peak_ref[head]
            peak = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
            shrink = jnp.exp(before - peak)
            weight = jnp.where(seen, jnp.exp(logits - peak), 0.0)
            total = jnp.sum(weight, axis=1, keepdims=True)
            peak_ref[head] = peak
            mass_ref[head] = mass_ref[head] * shrink + total
            sums_ref[head] *= shrink[None]
            sums_ref[head, j] = _block_sums(weight, plan.per_k)

    @pl.when(j == plan.steps - 1)
    def _():
        wide = plan.tile_k // plan.per_k
        for head in range(q_ref.shape[2]):
            mass = mass_ref[head]
            share = jnp.where(mass > 0, 1.0 / jnp.where(mass > 0, mass, 1.0), 0.0)
            for step in range(plan.steps):
                tile = _row_sums(sums_ref[head, step] * share, plan.per_q)
                width = min(wide, out_ref.shape[-1] - step * wide)
                at = (0, 0, head, slice(None), slice(step * wide, step * wide + width))
                out_ref[at] = tile[:, :width]


def _seen(i: Any, j: Any, plan: Any) -> Array:
    """Which key groups a query group sees; rows and columns that exist."""
    shape = (plan.tile_q, plan.tile_k)
    row = i * plan.tile_q + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    column = j * plan.tile_k + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    seen = (row < plan.rows) & (column < plan.columns)
    if not plan.causal:
        return seen
    end = (row + 1) * plan.size_q - 1 + plan.offset
    return seen & (column * plan.size_k <= end)


def _logits(queries_ref, keys_ref, head: int, slot: Any, plan: Any) -> Array:
    exact = keys_ref.dtype == jnp.float32
    logits = jax.lax.dot_general(
        queries_ref[head],
        keys_ref[slot],
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if exact else None,
    )
    return logits * plan.scale


def _block_sums(weight: Array, per_k: int) -> Array:
    """Sums over `per_k` neighbouring lanes.

    A product with zeros and ones, in two bfloat16 terms: 16 bits of the weights, a
    third of the cost of a full float32 product.
    """
    if per_k == 1:
        return weight
    columns = weight.shape[1]
    shape = (columns, columns // per_k)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 0) // per_k
    block = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    inside = (lane == block).astype(jnp.float32).astype(jnp.bfloat16)
    high = weight.astype(jnp.bfloat16)
    low = (weight - high.astype(jnp.float32)).astype(jnp.bfloat16)
    product = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    return product(high, inside) + product(low, inside)


def _row_sums(tile: Array, per_q: int) -> Array:
    """Sums over `per_q` neighbouring rows."""
    if per_q == 1:
        return tile
    rows = tile.shape[0]
    shape = (rows // per_q, rows)
    block = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 1) // per_q
    inside = (block == row).astype(jnp.float32)
    return jax.lax.dot(inside, tile, precision=jax.lax.Precision.HIGHEST)
