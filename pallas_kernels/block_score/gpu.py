"""Mass of key blocks per group of queries, tile by tile: the Hopper kernel.

A product whose epilogue sums. A thread block multiplies 64 or 128 groups of queries
with 128 groups of keys; one number per (query group, key block) goes to memory, the
log-sum-exp of its logits, and XLA turns these into shares and sums over query groups.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from kvjax.pallas_kernels import compat, gradients, tuning
from kvjax.pallas_kernels.block_score import xla
from kvjax.pallas_kernels.block_score.args import BlockArgs
from kvjax.pallas_kernels.block_score.groups import Groups, grouped

ROWS, COLUMNS = 64, 128
"""Query groups of a warp group; key groups of a thread block are a multiple."""
LOG2E = 1.4426950408889634
SHARED = 220 << 10  # bytes per thread block, less the results and barriers


class Plan(NamedTuple):
    """Static sizes of one call, in groups unless named otherwise."""

    rows: int
    columns: int
    tile_k: int
    inner: int  # key groups that the kernel sums
    groups: int  # compute warp groups
    stages: int
    vectors: int  # of `chunk` channels per group
    per_vector: int  # chunks of a token
    chunk: int  # channels
    size_q: int  # tokens
    size_k: int  # tokens
    offset: int  # tokens of `k` before the first one of `q`
    scale: float
    causal: bool

    @property
    def blocks(self) -> int:
        """Sums of a thread block."""
        return self.tile_k // self.inner

    @property
    def tiles(self) -> tuple[int, int]:
        """Thread blocks along query groups and along key groups."""
        return -(-self.rows // (self.groups * ROWS)), -(-self.columns // self.tile_k)


def block_score(
    args: BlockArgs,
    *,
    tiles: Mapping[str, Any] | None = None,
    interpret: bool = False,
) -> Float[Array, "B H T_block_q S_block_k"]:
    """See `api.block_score`."""
    _refuse(args.q)
    sizes = tuning.tiles("block_score", "h200", tiles)

    def kernel(args):
        g, q, k = grouped(args), args.q, args.k
        # The tensor cores take what the tokens have; means of it are as exact.
        g = g._replace(q=g.q.astype(q.dtype), k=g.k.astype(k.dtype))
        plan = _plan(g, k.shape[2] - q.shape[2], sizes, args.causal)
        out = _shares(plan, g, _run(plan, g, compat.gpu_interpret(interpret)))
        return out.reshape(*q.shape[:2], *out.shape[-2:])

    return gradients.through(kernel, xla.block_score, args)


def _refuse(q: Array) -> None:
    why = None
    if q.dtype == jnp.float32:
        why = "the tensor cores multiply bfloat16 or float16; got float32"
    elif q.shape[3] % 16:
        why = f"the head dim must be a multiple of 16; got {q.shape[3]}"
    if why:
        raise NotImplementedError(f"block_score: {why}.")


def _plan(g: Groups, offset: int, sizes: Mapping[str, int], causal: bool) -> Plan:
    rows, size, d = g.q.shape[3:]
    chunk = next(n for n in (128, d) if d % n == 0)
    groups = 1 if min(rows, sizes["rows"]) <= ROWS else 2
    # Logits take 64 or 128 registers of a thread.
    tile_k = COLUMNS if sizes["columns"] < 2 * COLUMNS else 2 * COLUMNS
    inner = math.gcd(g.per_k, 16)
    stage = (groups * ROWS + tile_k) * chunk * g.q.dtype.itemsize
    room = SHARED - groups * ROWS * (tile_k // inner) * 4
    return Plan(
        rows=rows,
        columns=g.k.shape[2],
        tile_k=tile_k,
        inner=inner,
        groups=groups,
        stages=max(1, min(sizes["stages"], room // stage)),
        vectors=size * d // chunk,
        per_vector=d // chunk,
        chunk=chunk,
        size_q=g.size_q,
        size_k=g.size_k,
        offset=offset,
        scale=g.scale,
        causal=causal,
    )


def _run(plan: Plan, g: Groups, interpret: Any) -> Array:
    """Log-sum-exp in base 2, `[B, H, M, N / inner]`; anything where nothing is seen."""
    b, kv_heads, heads, rows, size, d = g.q.shape
    queries = g.q.reshape(b, kv_heads * heads, rows, size * d)
    # Column `i * blocks + j` of a tile is group `i` of its block `j`: sums over a block
    # then add slices, and cross no thread.
    sums = plan.columns // plan.inner
    keys = g.k.reshape(b, kv_heads, sums, plan.inner, size * d)
    # Tiles in shared memory have 8 rows: other counts of groups are copied.
    queries = jnp.pad(queries, [(0, 0), (0, 0), (0, -rows % 8), (0, 0)])
    keys = jnp.pad(keys, [(0, 0), (0, 0), (0, -sums % 8), (0, 0), (0, 0)])
    swizzle = plgpu.find_swizzle(plan.chunk * 16)
    tiling = plgpu.TilingTransform((8, swizzle // 2))  # pyright: ignore[reportAbstractUsage]
    transforms = (tiling, plgpu.SwizzleTransform(swizzle))  # pyright: ignore[reportAbstractUsage]

    def near(*size):
        size = (plan.stages, *size, plan.chunk)
        return plgpu.SMEM(size, queries.dtype, transforms=transforms)

    across = plan.tiles[1] * plan.blocks
    run = plgpu.kernel(
        functools.partial(_kernel, heads=heads, plan=plan),
        out_type=jax.ShapeDtypeStruct((b, kv_heads * heads, rows, across), jnp.float32),
        scratch_types=dict(
            q_near=near(plan.groups * ROWS),
            k_near=near(plan.tile_k),
            out_near=plgpu.SMEM((plan.groups, ROWS, plan.blocks), jnp.float32),
            here=plgpu.Barrier(num_arrivals=1 + plan.inner, num_barriers=plan.stages),
            free=plgpu.Barrier(num_arrivals=plan.groups, num_barriers=plan.stages),
        ),
        grid=(*plan.tiles, kv_heads * heads, b),
        grid_names=("i", "j", "head", "row"),
        num_threads=plan.groups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return run(queries, keys)[..., :sums]


def _kernel(
    q_ref,  # [B, H, M, J * D] GMEM, tokens of a group in their order
    k_ref,  # [B, K, N / inner, inner, J * D] GMEM
    out_ref,  # [B, H, M, sums] GMEM
    *,
    q_near,  # [stages, groups * 64, chunk]
    k_near,  # [stages, tile_k, chunk]
    out_near,  # [groups, 64, blocks]
    here,
    free,
    heads: int,
    plan: Plan,
):
    """One tile; it returns at once if no query of it sees a key of it."""
    group, i, j = (lax.axis_index(name) for name in ("wg", "i", "j"))
    row, head = lax.axis_index("row"), lax.axis_index("head")
    first, column = i * (plan.groups * ROWS), j * plan.tile_k
    steps = jnp.int32(plan.vectors)
    if plan.causal:
        end = (first + plan.groups * ROWS) * plan.size_q - 1 + plan.offset
        steps = jnp.where(column * plan.size_k <= end, steps, 0)

    @pl.when((group < plan.groups) & (steps > 0))
    def _():
        plgpu.set_max_registers(232, action="increase")
        rows = pl.ds(pl.multiple_of(group * ROWS, ROWS), ROWS)

        def product(acc):
            @pl.loop(0, steps)
            def _(step):
                slot = lax.rem(step, jnp.int32(plan.stages))
                plgpu.barrier_wait(here.at[slot])
                near = k_near.at[slot].transpose((1, 0))
                plgpu.wgmma(acc, q_near.at[slot, rows], near)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[slot])

            return acc[...]

        shape = (ROWS, plan.tile_k)
        found = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
        top, mine = first + group * ROWS, out_near.at[group]
        mine[...] = _sums(found * (plan.scale * LOG2E), top, column, plan)
        plgpu.commit_smem()
        to = (row, head, pl.ds(top, ROWS), pl.ds(j * plan.blocks, plan.blocks))
        plgpu.copy_smem_to_gmem(mine, out_ref.at[to])
        plgpu.wait_smem_to_gmem(0)

    @pl.when((group == plan.groups) & (steps > 0))
    def _():
        plgpu.set_max_registers(40, action="decrease")
        kv_head = lax.div(head, jnp.int32(heads))
        blocks = pl.ds(j * plan.blocks, plan.blocks)

        @pl.loop(0, steps)
        def _(step):
            slot = lax.rem(step, jnp.int32(plan.stages))
            full = step >= plan.stages
            pl.when(full)(lambda: plgpu.barrier_wait(free.at[slot]))
            token, part = lax.div(step, plan.per_vector), lax.rem(step, plan.per_vector)
            # The antidiagonal: queries of a group from the last one to the first.
            back = (plan.vectors // plan.per_vector - 1 - token) * plan.per_vector
            at_q = pl.ds((back + part) * plan.chunk, plan.chunk)
            at_k = pl.ds(step * plan.chunk, plan.chunk)
            rows = pl.ds(first, plan.groups * ROWS)
            queries = q_ref.at[row, head, rows, at_q]
            plgpu.copy_gmem_to_smem(queries, q_near.at[slot], here.at[slot])
            for one in range(plan.inner):
                to = k_near.at[slot, pl.ds(one * plan.blocks, plan.blocks)]
                keys = k_ref.at[row, kv_head, blocks, one, at_k]
                plgpu.copy_gmem_to_smem(keys, to, here.at[slot])

        for slot in range(plan.stages):  # the interpreter wants every phase waited for
            wait = functools.partial(plgpu.barrier_wait, free.at[slot])
            pl.when(slot < steps)(wait)


def _sums(logits: Array, first: Any, column: Any, plan: Plan) -> Array:
    """Log-sum-exp of the key groups of each sum, logits in base 2, `[64, blocks]`."""
    blocks, layout = plan.blocks, plgpu.Layout.WGMMA
    slices = [logits[:, i * blocks : (i + 1) * blocks] for i in range(plan.inner)]
    if plan.inner == 1:
        return slices[0]
    if plan.causal:
        shape = (ROWS, blocks)
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) + first
        block = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
        end = (row + 1) * plan.size_q - 1 + plan.offset
        start = (column + block * plan.inner) * plan.size_k
        slices = [
            jnp.where(start + i * plan.size_k <= end, one, LOW)
            for i, one in enumerate(slices)
        ]
    peak = functools.reduce(jnp.maximum, slices)
    return peak + jnp.log2(sum(jnp.exp2(one - peak) for one in slices))


LOW = -1e30
"""Stands for -inf: differences of it stay numbers."""


def _shares(plan: Plan, g: Groups, parts: Float[Array, "B H M N"]) -> Array:
    """Softmax over the sums of a row, then sums over blocks."""
    *lead, rows, sums = parts.shape
    if plan.causal:
        end = (jnp.arange(rows) + 1) * plan.size_q - 1 + plan.offset
        start = jnp.arange(sums) * (plan.size_k * plan.inner)
        parts = jnp.where(start <= end[:, None], parts, LOW)
    weight = jnp.exp2(parts - jnp.max(parts, axis=-1, keepdims=True))
    weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
    per_k = g.per_k // plan.inner
    shape = (*lead, rows // g.per_q, g.per_q, sums // per_k, per_k)
    return jnp.sum(weight.reshape(shape), axis=(-3, -1))
