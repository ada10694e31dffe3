"""`page_summary` on TPU: one grid step per (row, KV head, block of slots)."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kvjax.pallas_kernels import compat, tuning
from kvjax.pallas_kernels.page_summary.summary import PageSummary

SUBLANES = 8
TILE_ROWS = 16
"""Of a tile of bf16; blocks of results are whole tiles."""


def page_summary(keys, live, *, page, tiles=None, interpret=False) -> PageSummary:
    """See `api.page_summary`."""
    b, k, s, d = keys.shape
    if keys.dtype == jnp.float16:
        raise NotImplementedError(
            "page_summary: `keys` are float16, which a TPU does not load."
        )
    if page % SUBLANES:
        raise NotImplementedError(
            f"page_summary: pages of {page} slots are not whole groups of {SUBLANES} "
            "rows of a TPU's vector registers."
        )
    block = tuning.tiles("page_summary", given=tiles)["slots"]
    # Whole tiles of results, and whole rows of lanes of the mask.
    unit = math.lcm(page * TILE_ROWS, 128)
    block = s if s <= max(block, unit) else max(unit, block // unit * unit)
    count = s // page
    # The mask as numbers along the lanes; one more axis would pad it 128 times.
    mask = live.astype(keys.dtype).reshape(b, k, 1, s)

    def at(i, k, j):
        return i, k, j, 0

    out = pl.BlockSpec((None, None, block // page, d), at)
    if not interpret:
        # Else XLA may copy a whole cache into VMEM before the kernel starts.
        keys = pltpu.with_memory_space_constraint(keys, pltpu.HBM)
    summary = pl.pallas_call(
        functools.partial(_kernel, page=page),
        grid=(b, k, pl.cdiv(s, block)),
        in_specs=[
            pl.BlockSpec((None, None, block, d), at),
            pl.BlockSpec((None, None, 1, block), lambda i, k, j: (i, k, 0, j)),
        ],
        out_specs=[out] * 3,
        out_shape=[jax.ShapeDtypeStruct((b, k, count, d), keys.dtype)] * 3,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        cost_estimate=pl.CostEstimate(
            flops=4 * keys.size,
            transcendentals=0,
            bytes_accessed=(keys.size * (1 + 3 / page) + mask.size).__ceil__()
            * keys.dtype.itemsize,
        ),
        interpret=compat.tpu_interpret(interpret),
        name="page_summary",
    )(keys, mask)
    return PageSummary(*summary)


def _kernel(
    keys_ref,  # [block, D]
    live_ref,  # [1, block]
    low_ref,  # [block / page, D], as the others
    high_ref,
    mean_ref,
    *,
    page,
):
    block, d = keys_ref.shape
    # A row of the mask becomes a column: eight equal rows make a tile to transpose.
    mask = jnp.broadcast_to(live_ref[...].astype(jnp.float32), (SUBLANES, block))
    mask = jnp.swapaxes(mask, 0, 1)[:, :1] > 0
    mask = jnp.broadcast_to(mask, (block, d)).reshape(block // page, page, d)
    keys = keys_ref[...].astype(jnp.float32).reshape(block // page, page, d)
    low = jnp.min(jnp.where(mask, keys, jnp.inf), axis=1)
    high = jnp.max(jnp.where(mask, keys, -jnp.inf), axis=1)
    total = jnp.sum(jnp.where(mask, keys, 0.0), axis=1)
    count = jnp.sum(mask.astype(jnp.float32), axis=1)
    some = count > 0
    low_ref[...] = jnp.where(some, low, 0.0).astype(low_ref.dtype)
    high_ref[...] = jnp.where(some, high, 0.0).astype(high_ref.dtype)
    mean_ref[...] = (total / jnp.maximum(count, 1.0)).astype(mean_ref.dtype)
