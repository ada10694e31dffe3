"""Scores, softmax and block sums of groups, tile by tile: the Mosaic TPU kernel.

One pass over the key groups for every tile of query groups: sums per key block are
kept unnormalised in VMEM, scaled down whenever a higher score turns up, and divided by
the softmax's normaliser at the end. The map over groups never leaves the chip.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kvjax.pallas_kernels import compat, gradients, tuning
from kvjax.pallas_kernels.block_score import xla
from kvjax.pallas_kernels.block_score.groups import Groups, grouped

LANES, SUBLANES = 128, 8
LOW = -1e30
"""Stands for -inf in running maxima: differences of it stay numbers."""
VMEM = 60 << 20


class Plan(NamedTuple):
    """Static sizes of one call, in groups unless named otherwise."""

    rows: int
    columns: int
    tile_q: int
    tile_k: int
    per_q: int
    per_k: int
    size_q: int
    size_k: int
    offset: int  # tokens of `k` before the first one of `q`
    scale: float
    causal: bool

    @property
    def steps(self) -> int:
        """Tiles of key groups."""
        return -(-self.columns // self.tile_k)

    def last_step(self, i: Any) -> Any:
        """The last tile of key groups that a tile of query groups sees."""
        if not self.causal:
            return jnp.int32(self.steps - 1)
        last_token = (i + 1) * self.tile_q * self.size_q - 1 + self.offset
        step = jax.lax.div(last_token, jnp.int32(self.tile_k * self.size_k))
        return jax.lax.min(step, jnp.int32(self.steps - 1))


def block_score(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K S D"],
    *,
    block_q: int,
    block_k: int,
    mode: str,
    stride: int,
    scale: float,
    causal: bool,
    tiles: Mapping[str, Any] | None = None,
    interpret: bool = False,
) -> Float[Array, "B H T_block_q S_block_k"]:
    """See `api.block_score`."""
    if q.dtype == jnp.float16:
        raise NotImplementedError("block_score: TPUs hold no float16; use bfloat16.")
    sizes = tuning.tiles("block_score", None, tiles)
    how = {"block_q": block_q, "block_k": block_k, "mode": mode, "stride": stride}

    def kernel(q, k):
        g = grouped(q, k, scale=scale, **how)
        plan = _plan(g, k.shape[2] - q.shape[2], sizes, causal)
        out = _run(plan, g, compat.tpu_interpret(interpret))
        return out.reshape(*q.shape[:2], *out.shape[3:])

    plain = functools.partial(xla.block_score, scale=scale, causal=causal, **how)
    return gradients.through(kernel, plain, q, k)


def _plan(g: Groups, offset: int, sizes: Mapping[str, int], causal: bool) -> Plan:
    rows, columns = g.q.shape[3], g.k.shape[2]
    unit_q, unit_k = SUBLANES * g.per_q, LANES * g.per_k
    tile_q = max(unit_q, sizes["rows"] // unit_q * unit_q)
    tile_k = max(unit_k, sizes["columns"] // unit_k * unit_k)
    return Plan(
        rows=rows,
        columns=columns,
        tile_q=min(rows, tile_q),
        tile_k=min(columns, tile_k),
        per_q=g.per_q,
        per_k=g.per_k,
        size_q=g.size_q,
        size_k=g.size_k,
        offset=offset,
        scale=g.scale,
        causal=causal,
    )


def _run(plan: Plan, g: Groups, interpret: Any) -> Array:
    b, kv_heads, heads, rows, size, d = g.q.shape
    long = size * d
    # One long vector per group: the antidiagonal of a tile is one dot product. XLA
    # writes this copy; strided reads of single rows in the kernel would cost more.
    queries = jnp.flip(g.q, axis=4).reshape(b, kv_heads, heads, rows, long)
    keys = g.k.reshape(b, kv_heads, plan.columns, long)
    blocks_q, blocks_k = rows // plan.per_q, plan.columns // plan.per_k
    state = pltpu.VMEM((heads, plan.tile_q, 1), jnp.float32)
    sums = (heads, plan.steps, plan.tile_q, plan.tile_k // plan.per_k)
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        # rows, KV heads, tiles of query groups, tiles of key groups
        grid=(b, kv_heads, -(-rows // plan.tile_q), plan.steps),
        in_specs=(
            pl.BlockSpec(
                (1, 1, heads, plan.tile_q, long),
                lambda b, k, i, j: (b, k, 0, i, 0),
            ),
            pl.BlockSpec(
                (1, 1, plan.tile_k, long),
                # A tile out of sight repeats the index before it: no copy.
                lambda b, k, i, j: (b, k, jax.lax.min(j, plan.last_step(i)), 0),
            ),
        ),
        out_specs=pl.BlockSpec(
            (1, 1, heads, plan.tile_q // plan.per_q, blocks_k),
            lambda b, k, i, j: (b, k, 0, i, 0),
        ),
        out_shape=jax.ShapeDtypeStruct(
            (b, kv_heads, heads, blocks_q, blocks_k), jnp.float32
        ),
        scratch_shapes=(state, state, pltpu.VMEM(sums, jnp.float32)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM,
        ),
        interpret=interpret,
        name="kv_block_score",
    )(queries, keys)


def _kernel(
    q_ref,  # [1, 1, G, tile_q, J * D]
    k_ref,  # [1, 1, tile_k, J * D]
    out_ref,  # [1, 1, G, tile_q / per_q, S / block_k]
    peak_ref,  # [G, tile_q, 1]
    mass_ref,  # [G, tile_q, 1]
    sums_ref,  # [G, steps, tile_q, tile_k / per_k]
    *,
    plan: Plan,
):
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        peak_ref[...] = jnp.full_like(peak_ref, LOW)
        mass_ref[...] = jnp.zeros_like(mass_ref)
        sums_ref[...] = jnp.zeros_like(sums_ref)

    @pl.when(j <= plan.last_step(i))
    def _():
        seen = _seen(i, j, plan)
        for head in range(q_ref.shape[2]):
            logits = jnp.where(seen, _logits(q_ref, k_ref, head, plan), LOW)
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


def _seen(i: Any, j: Any, plan: Plan) -> Array:
    """Which key groups a query group sees; rows and columns that exist."""
    shape = (plan.tile_q, plan.tile_k)
    row = i * plan.tile_q + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    column = j * plan.tile_k + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    seen = (row < plan.rows) & (column < plan.columns)
    if not plan.causal:
        return seen
    end = (row + 1) * plan.size_q - 1 + plan.offset
    return seen & (column * plan.size_k <= end)


def _logits(q_ref, k_ref, head: int, plan: Plan) -> Array:
    exact = k_ref.dtype == jnp.float32
    logits = jax.lax.dot_general(
        q_ref[0, 0, head],
        k_ref[0, 0],
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
