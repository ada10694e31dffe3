"""Scores, softmax and block sums of groups, tile by tile: the Mosaic TPU kernel.

One pass over the key groups for every tile of query groups: sums per key block are
kept unnormalised in VMEM, scaled down whenever a higher score turns up, and divided by
the softmax's normaliser at the end. The map over groups never leaves the chip. Keys of
a head stay in VMEM, as many as fit: they are read once, not once per tile of queries.
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
from kvjax.pallas_kernels.block_score import regroup, tpu_kernel, xla
from kvjax.pallas_kernels.block_score.args import BlockArgs
from kvjax.pallas_kernels.block_score.groups import Groups, grouped

LANES, SUBLANES = 128, 8
VMEM = 60 << 20
"""That a kernel may take; v7x has 64 MiB, the others more."""
SPARE = 8 << 20
"""Of it, for the temporaries of a step."""


class Plan(NamedTuple):
    """Static sizes of one call, in groups unless named otherwise.

    Attributes:
        vectors: of a group, which the kernel puts one after the other; 1 where they
            lie so already.
        resident: tiles of key groups that stay in VMEM.
    """

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
    vectors: int = 1
    resident: int = 0

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
    args: BlockArgs,
    *,
    tiles: Mapping[str, Any] | None = None,
    interpret: bool = False,
) -> Float[Array, "B H T_block_q S_block_k"]:
    """See `api.block_score`."""
    if args.q.dtype == jnp.float16:
        raise NotImplementedError("block_score: TPUs hold no float16; use bfloat16.")
    sizes = tuning.tiles("block_score", None, tiles)

    def kernel(args):
        g, (b, h, t, _) = grouped(args), args.q.shape
        plan = _plan(g, args.k.shape[2] - t, sizes, args.causal)
        out = _run(plan, g, compat.tpu_interpret(interpret))
        return out.reshape(b, h, *out.shape[3:])

    return gradients.through(kernel, xla.block_score, args)


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
    # One long vector per group: the antidiagonal of a tile is one dot product.
    if regroup.possible(size, d, g.q.dtype, plan.tile_q, plan.tile_k):
        plan = plan._replace(vectors=size)
        queries = g.q.reshape(b, kv_heads, heads, rows * size, d)
        keys = g.k.reshape(b, kv_heads, plan.columns * size, d)
    else:  # XLA writes a copy.
        queries = jnp.flip(g.q, axis=4).reshape(b, kv_heads, heads, rows, long)
        keys = g.k.reshape(b, kv_heads, plan.columns, long)
    plan = plan._replace(resident=_resident(plan, heads, long, keys.dtype))
    if not interpret:
        # Else XLA may copy them into VMEM before the kernel starts.
        queries, keys = (
            pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (queries, keys)
        )
    return _call(plan, queries, keys, long, interpret)


def _resident(plan: Plan, heads: int, long: int, dtype: Any) -> int:
    """Tiles of keys that fit beside all else."""
    long = -(-long // LANES) * LANES * jnp.dtype(dtype).itemsize
    tile = plan.tile_k * long
    sums = max(LANES, plan.tile_k // plan.per_k) * plan.steps * plan.tile_q
    room = VMEM - SPARE - 2 * tile - 3 * heads * plan.tile_q * long - 4 * heads * sums
    fit = max(0, min(plan.steps, room // tile))
    return fit if fit == plan.steps else max(0, fit - 1)


def _call(plan: Plan, queries: Array, keys: Array, long: int, interpret: Any) -> Array:
    b, kv_heads, heads, _, wide = queries.shape
    rows, dtype = plan.rows, keys.dtype
    blocks_q, blocks_k = rows // plan.per_q, plan.columns // plan.per_k
    state = pltpu.VMEM((heads, plan.tile_q, 1), jnp.float32)
    sums = (heads, plan.steps, plan.tile_q, plan.tile_k // plan.per_k)
    held = (plan.resident + (plan.resident < plan.steps), plan.tile_k, long)

    tiles_q = -(-rows // plan.tile_q)
    read = tiles_q - (tiles_q - 1) * plan.resident // plan.steps  # times, at most

    def fetched(b, k, i, j):
        # A tile out of sight, or in VMEM, repeats the index before it: no copy.
        last = jax.lax.max(plan.last_step(i), jnp.int32(plan.resident))
        last = jax.lax.min(last, jnp.int32(plan.steps - 1))
        again = jax.lax.min(jax.lax.max(j, jnp.int32(plan.resident)), last)
        return b, k, jax.lax.select(i == 0, j, again), 0

    return pl.pallas_call(
        functools.partial(tpu_kernel.kernel, plan=plan),
        # rows, KV heads, tiles of query groups, tiles of key groups
        grid=(b, kv_heads, tiles_q, plan.steps),
        in_specs=(
            pl.BlockSpec(
                (1, 1, heads, plan.tile_q * plan.vectors, wide),
                lambda b, k, i, j: (b, k, 0, i, 0),
            ),
            pl.BlockSpec((1, 1, plan.tile_k * plan.vectors, wide), fetched),
        ),
        out_specs=pl.BlockSpec(
            (1, 1, heads, plan.tile_q // plan.per_q, blocks_k),
            lambda b, k, i, j: (b, k, 0, i, 0),
        ),
        out_shape=jax.ShapeDtypeStruct(
            (b, kv_heads, heads, blocks_q, blocks_k), jnp.float32
        ),
        scratch_shapes=(
            state,
            state,
            pltpu.VMEM(sums, jnp.float32),
            pltpu.VMEM((heads, plan.tile_q, long), dtype),
            pltpu.VMEM(held, dtype),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * queries.size * plan.columns,
            transcendentals=queries.size // long * plan.columns,
            bytes_accessed=(queries.size + read * keys.size) * dtype.itemsize
            + 4 * b * kv_heads * heads * blocks_q * blocks_k,
        ),
        interpret=interpret,
        name="kv_block_score",
    )(queries, keys)
