"""Bodies of the two TPU kernels of `column_stats`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kvjax.pallas_kernels.partial import cap

LANES = 128
LOW = -1e30
"""Stands for -inf in running maxima: differences of it stay numbers."""


def skewed_lanes(plan: Any) -> int:
    """Lanes that the diagonals of one tile take."""
    return plan.block_k + -(-plan.block_q // LANES) * LANES + -plan.block_k % LANES


def _crossed(bounds, i, j, plan: Any) -> Array:
    """Whether any query of block `i` may see any key of block `j`."""
    first_q, last_q, first_k, last_k = bounds
    row = pl.program_id(0)
    crossed = first_k[row, j] <= last_q[row, i]
    if plan.window is not None:
        crossed &= first_q[row, i] - last_k[row, j] < plan.window
    return crossed


def _column(row: Array) -> Array:
    """`[1, n]` to `[n, 1]`."""
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


def _row(column: Array) -> Array:
    """`[n, 1]` to `[1, n]`."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def _seen(at_q_ref, at_k_ref, plan: Any) -> Array:
    at_q, at_k = _column(at_q_ref[0]), at_k_ref[0]
    seen = (at_k >= 0) & (at_k <= at_q)
    return seen if plan.window is None else seen & (at_q - at_k < plan.window)


def _logits(q_ref, k_ref, head: int, plan: Any) -> Array:
    exact = k_ref.dtype == jnp.float32
    logits = jax.lax.dot_general(
        q_ref[0, 0, head],
        k_ref[0, 0],
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if exact else None,
    )
    return cap(logits * plan.scale, plan.softcap)


def normalisers(
    *refs,
    plan: Any,
):
    """Log-sum-exp of every query over the keys that it sees."""
    (
        *bounds,  # 4 of [B, blocks] int32
        q_ref,  # [1, 1, G, block_q, D]
        k_ref,  # [1, 1, block_k, D]
        at_q_ref,  # [1, 1, block_q] int32
        at_k_ref,  # [1, 1, block_k] int32
        lse_ref,  # [1, 1, G, block_q]
        peak_ref,  # [G, block_q, 1]
        mass_ref,  # [G, block_q, 1]
    ) = refs
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        peak_ref[...] = jnp.full_like(peak_ref, LOW)
        mass_ref[...] = jnp.zeros_like(mass_ref)

    @pl.when(_crossed(bounds, i, j, plan))
    def _():
        seen = _seen(at_q_ref, at_k_ref, plan)
        for head in range(q_ref.shape[2]):
            logits = jnp.where(seen, _logits(q_ref, k_ref, head, plan), LOW)
            before = peak_ref[head]
            peak = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
            weight = jnp.where(seen, jnp.exp(logits - peak), 0.0)
            mass = jnp.sum(weight, axis=1, keepdims=True)
            mass_ref[head] = mass_ref[head] * jnp.exp(before - peak) + mass
            peak_ref[head] = peak

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        for head in range(q_ref.shape[2]):
            mass = mass_ref[head]
            lse = peak_ref[head] + jnp.log(jnp.where(mass > 0, mass, 1.0))
            lse_ref[0, 0, head : head + 1] = _row(lse)


def sums(*refs, plan: Any):
    """Sums and maxima of the normalised weights over the queries, and diagonal sums."""
    (
        *bounds,  # 4 of [B, blocks] int32
        q_ref,  # [1, 1, G, block_q, D]
        k_ref,  # [1, 1, block_k, D]
        at_q_ref,  # [1, 1, block_q] int32
        at_k_ref,  # [1, 1, block_k] int32
        lse_ref,  # [1, 1, G, block_q]
        weights_ref,  # [1, 1, G, block_q]
    ) = refs[:10]
    sum_ref, max_ref = refs[10:12]  # [1, 1, G, block_k]
    along_ref = refs[12] if len(refs) > 12 else None  # [1, 1, G, rows, 128]
    j, i = pl.program_id(2), pl.program_id(3)

    @pl.when(i == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        max_ref[...] = jnp.zeros_like(max_ref)

    if along_ref is not None:

        @pl.when((i == 0) & (j == 0))
        def _():
            along_ref[...] = jnp.zeros_like(along_ref)

    @pl.when(_crossed(bounds, i, j, plan))
    def _():
        seen = _seen(at_q_ref, at_k_ref, plan)
        for head in range(q_ref.shape[2]):
            logits = _logits(q_ref, k_ref, head, plan)
            lse = _column(lse_ref[0, 0, head : head + 1])
            factor = _column(weights_ref[0, 0, head : head + 1])
            rows = jnp.where(seen, jnp.exp(logits - lse) * factor, 0.0)
            here = (0, 0, slice(head, head + 1))
            sum_ref[here] += jnp.sum(rows, axis=0, keepdims=True)
            max_ref[here] = jnp.maximum(
                max_ref[here], jnp.max(rows, axis=0, keepdims=True)
            )
            if along_ref is not None:
                _add_diagonals(along_ref, head, rows, i, j, plan)


def _add_diagonals(along_ref, head: int, rows: Array, i, j, plan: Any) -> None:
    """Row `r`, column `c` of a tile goes to diagonal `r + c` behind the tile's first.

    Tiles start at multiples of the lanes, or there is one of them: their diagonals
    are added whole rows of 128 at a time.
    """
    wide = skewed_lanes(plan)
    rows = jnp.pad(rows, [(0, 0), (0, wide - rows.shape[1])])
    skewed = pltpu.roll(rows, 0, 1, stride=1, stride_axis=0)
    total = jnp.sum(skewed, axis=0, keepdims=True)
    first = (i * plan.block_q + j * plan.block_k) // LANES
    for chunk in range(wide // LANES):
        at = (0, 0, head, pl.ds(first + chunk, 1))
        along_ref[at] += total[:, chunk * LANES : (chunk + 1) * LANES]
