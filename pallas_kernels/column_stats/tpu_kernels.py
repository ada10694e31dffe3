"""Body of the TPU kernel of `column_stats`."""

import functools
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


def _seen(at_q_ref, at_k: Array, plan: Any) -> Array:
    at_q = _column(at_q_ref[0])
    seen = (at_k >= 0) & (at_k <= at_q)
    return seen if plan.window is None else seen & (at_q - at_k < plan.window)


def _logits(q_ref, held_ref, slot, head: int, plan: Any) -> Array:
    exact = held_ref.dtype == jnp.float32
    logits = jax.lax.dot_general(
        q_ref[0, 0, head],
        held_ref[slot],
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if exact else None,
    )
    return cap(logits * plan.scale, plan.softcap)


def kernel(*refs, plan: Any):
    """One tile: of the walk that normalises, or of the one that sums."""
    bounds, refs = refs[:4], list(refs[4:])  # 4 of [B, blocks] int32
    q_ref = refs.pop(0)  # [1, 1, G, block_q, D]
    k_ref = refs.pop(0)  # [1, 1, block_k, D]
    at_q_ref = refs.pop(0)  # [1, 1, block_q] int32
    at_k_ref = refs.pop(0)  # [1, blocks_k, block_k] int32
    weights_ref = refs.pop(0)  # [1, 1, G, block_q]
    given_ref = refs.pop(0) if plan.given else None  # [1, 1, G, block_q]
    sum_ref, max_ref = refs.pop(0), refs.pop(0)  # [1, 1, heads, block_k or all]
    along_ref = refs.pop(0) if plan.slash else None  # [1, 1, G, rows, 128]
    # lse (first: peaks) and masses [G, block_q, 1]; keys [blocks, block_k, D]
    lse_ref, mass_ref, held_ref = refs
    i, walk, j = (pl.program_id(axis) for axis in (2, 3, 4))
    first = (i == 0) & (walk == 0)
    slot = jnp.minimum(j, plan.resident)

    @pl.when(first | (j >= plan.resident))
    def _():
        held_ref[slot] = k_ref[0, 0]

    def tile():
        seen = _seen(at_q_ref, at_k_ref[0, pl.ds(j, 1)], plan)
        return seen, functools.partial(_logits, q_ref, held_ref, slot, plan=plan)

    crossed = _crossed(bounds, i, j, plan)
    if given_ref is not None:

        @pl.when(j == 0)
        def _():
            for head in range(plan.groups):
                lse = _column(given_ref[0, 0, head : head + 1])
                lse_ref[head] = jnp.where(lse > LOW, lse, -LOW)  # -inf: no vote

    else:
        pl.when(walk == 0)(
            lambda: _normalise(tile, crossed, j, lse_ref, mass_ref, plan)
        )

    @pl.when(walk == pl.num_programs(3) - 1)
    def _():
        here = pl.ds(pl.multiple_of(j * plan.block_k, LANES), plan.block_k)
        here = here if plan.whole else slice(None)
        head_0 = pl.program_id(1) % plan.together * plan.groups

        @pl.when(i == 0)
        def _():
            for head in range(plan.groups):
                at = (0, 0, pl.ds(head_0 + head, 1), here)
                sum_ref[at] = jnp.zeros((1, plan.block_k), jnp.float32)
                max_ref[at] = jnp.zeros((1, plan.block_k), jnp.float32)

        if along_ref is not None:

            @pl.when((i == 0) & (j == 0))
            def _(ref=along_ref):
                ref[...] = jnp.zeros_like(ref)

        @pl.when(crossed)
        def _():
            seen, logits = tile()
            for head in range(plan.groups):
                factor = _column(weights_ref[0, 0, head : head + 1])
                rows = jnp.exp(logits(head) - lse_ref[head]) * factor
                rows = jnp.where(seen, rows, 0.0)
                at = (0, 0, pl.ds(head_0 + head, 1), here)
                sum_ref[at] += jnp.sum(rows, axis=0, keepdims=True)
                highest = jnp.max(rows, axis=0, keepdims=True)
                max_ref[at] = jnp.maximum(max_ref[at], highest)
                if along_ref is not None:
                    _add_diagonals(along_ref, head, rows, i, j, plan)


def _normalise(tile, crossed, j, lse_ref, mass_ref, plan: Any) -> None:
    """Log-sum-exp of every query over the keys that it sees, tile by tile."""

    @pl.when(j == 0)
    def _():
        lse_ref[...] = jnp.full_like(lse_ref, LOW)
        mass_ref[...] = jnp.zeros_like(mass_ref)

    @pl.when(crossed)
    def _():
        seen, logits_of = tile()
        for head in range(plan.groups):
            logits = jnp.where(seen, logits_of(head), LOW)
            before = lse_ref[head]
            peak = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
            weight = jnp.where(seen, jnp.exp(logits - peak), 0.0)
            mass = jnp.sum(weight, axis=1, keepdims=True)
            mass_ref[head] = mass_ref[head] * jnp.exp(before - peak) + mass
            lse_ref[head] = peak

    @pl.when(j == pl.num_programs(4) - 1)
    def _():
        mass = mass_ref[...]
        lse_ref[...] += jnp.log(jnp.where(mass > 0, mass, 1.0))


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
