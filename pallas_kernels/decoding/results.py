"""From the registers of a program to partial softmaxes."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kvjax.pallas_kernels.decoding import splits
from kvjax.pallas_kernels.decoding.program import Plan
from kvjax.pallas_kernels.decoding.warps import WARPS
from kvjax.pallas_kernels.partial import Partial


def collected(plan: Plan, found: Float[Array, "B K P R 128"]) -> Partial:
    """The union of what all warps of all splits found, `[B, K, 8 columns, D]`."""
    *lead, parts, _, _ = found.shape
    layout, columns = plan.layout, plan.columns
    # Lane 4 g + t holds queries 2 t and 2 t + 1, and rows g and g + 8.
    found = found.reshape(*lead, parts, plan.results, WARPS, 8, 4)
    found = jnp.moveaxis(found, -3, len(lead) + 1)  # [..., P, warps, R, g, t]
    found = found.reshape(*lead, parts * WARPS, plan.results, 8, 4)
    peak, total, out = jnp.split(
        found, np.cumsum([layout["peak"], layout["total"]]), axis=-3
    )

    def per_query(x):
        x = x[..., 0, :].reshape(*x.shape[:-3], columns, 2, 4)
        return x.swapaxes(-1, -2).reshape(*x.shape[:-3], 8 * columns)

    peak, total = per_query(peak), per_query(total)
    side = plan.values
    out = out.reshape(*out.shape[:-3], len(side.tiles), columns, 2, 2, 8, 4)
    # Axes: tile, column, upper or lower rows, which query, g, t.
    rows = (-2, -4) if side.coded else (-4, -2)
    lead_axes = range(out.ndim - 6)
    out = out.transpose(
        *lead_axes, *(out.ndim + axis for axis in (-5, -1, -3, -6, *rows))
    )
    out = out.reshape(*out.shape[:-6], 8 * columns, len(side.tiles), 16)
    order = np.argsort([channel for _, _, channel in side.tiles])
    out = out[..., order, :].reshape(*out.shape[:-2], side.width)
    safe = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, peak * math.log(2.0) + jnp.log(safe), -jnp.inf)
    return splits.union(out / safe[..., None], lse)
