"""`page_score` on Hopper: one thread block per (row, KV head, block of pages).

A warpgroup multiplies the queries of a KV head, padded to the 64 rows of a `wgmma`,
with the pages. The scores of single heads go to memory, and XLA combines them: with 4
heads of 128 bf16 channels that is a tenth of what is read at most.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from kvjax.pallas_kernels import compat, stacked, tuning
from kvjax.pallas_kernels.page_score.args import PageArgs

ROWS = 64
"""Rows of a `wgmma`: query heads of a KV head times queries, padded."""


def page_score(args: PageArgs, *, tiles=None, interpret=False) -> Array:
    """See `api.page_score`."""
    q, a, b, row, group = args.q, args.a, args.b, args.row, args.group
    _refuse(q, a)
    (n, h, t, d), (kv_heads, pages) = q.shape, a.shape[1:3]
    block = tuning.tiles("page_score", "h200", tiles)["pages"]
    rows = h // kv_heads * t
    if pages % 8:
        # Tiles in shared memory have 8 rows: other counts of pages are copied.
        a, b = stacked.rows((a, b), row, n)
        row = None
    lead = [] if row is None else [jnp.reshape(row, 1)]
    queries = q.reshape(n, kv_heads, rows, d)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, ROWS - rows), (0, 0)))
    sides = [(queries, a)]
    if args.mode == "bound":
        # Negative channels of a query meet the minimum, positive ones the maximum.
        sides = [(jnp.minimum(queries, 0), a), (jnp.maximum(queries, 0), b)]
    more = ((0, 0), (0, 0), (0, -pages % 8), (0, 0))
    sides = [(queries, jnp.pad(x, more)) for queries, x in sides]
    steps = pl.cdiv(pages, block)
    swizzle = plgpu.find_swizzle(d * 16)
    near = (
        plgpu.TilingTransform((8, swizzle // 2)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
    )
    kept = -(-rows // 8) * 8
    run = plgpu.kernel(
        functools.partial(_kernel, sides=len(sides)),
        out_type=jax.ShapeDtypeStruct((n, kv_heads, kept, steps * block), jnp.float32),
        scratch_types=dict(
            q_near=plgpu.SMEM((len(sides), ROWS, d), q.dtype, transforms=near),
            page_near=plgpu.SMEM((len(sides), block, d), q.dtype, transforms=near),
            out_near=plgpu.SMEM((ROWS, block), jnp.float32),
            here=plgpu.Barrier(num_arrivals=2, num_barriers=len(sides)),
        ),
        grid=(steps, kv_heads, n),
        grid_names=("step", "head", "row"),
        interpret=compat.gpu_interpret(interpret),
    )
    score = run(*lead, *(x for side in sides for x in side))[:, :, :rows, :pages]
    score = score.reshape(n, kv_heads, h // kv_heads, t, pages)
    if group.startswith("softmax"):
        score = jax.nn.softmax(score * args.scale, axis=-1)
    return jnp.max(score, 2) if group.endswith("max") else jnp.sum(score, 2)


def _refuse(q, a) -> None:
    """`NotImplementedError` for what the kernel does not do."""
    why = None
    if q.dtype != a.dtype or q.dtype == jnp.float32:
        why = (
            "queries and pages must both be bfloat16 or both float16, what `wgmma` "
            f"multiplies; got {q.dtype} and {a.dtype}"
        )
    elif q.shape[3] % 16:
        why = f"the head dim must be a multiple of 16; got {q.shape[3]}"
    elif (rows := q.shape[1] // a.shape[1] * q.shape[2]) > ROWS:
        why = f"at most {ROWS} queries per KV head; got {rows}"
    if why:
        raise NotImplementedError(f"page_score: {why}.")


def _kernel(*refs, sides, q_near, page_near, out_near, here):
    """All heads of a group against one block of pages."""
    *refs, out_ref = refs
    step, head, row = (lax.axis_index(name) for name in ("step", "head", "row"))
    stored = row
    if len(refs) > 2 * sides:
        lead_ref, *refs = refs
        stored = row + lead_ref[0]
    block = page_near.shape[1]
    some = pl.ds(step * block, block)
    for i in range(sides):
        q_ref, page_ref = refs[2 * i : 2 * i + 2]
        plgpu.copy_gmem_to_smem(q_ref.at[row, head], q_near.at[i], here.at[i])
        plgpu.copy_gmem_to_smem(
            page_ref.at[stored, head, some], page_near.at[i], here.at[i]
        )

    def score(ref):
        for i in range(sides):
            plgpu.barrier_wait(here.at[i])
            plgpu.wgmma(ref, q_near.at[i], page_near.at[i].transpose((1, 0)))
        return ref[...]

    out_near[...] = pl.run_scoped(
        score, plgpu.WGMMAAccumulatorRef((ROWS, block), jnp.float32)
    )
    plgpu.commit_smem()
    kept = pl.ds(0, out_ref.shape[2])
    plgpu.copy_smem_to_gmem(out_near.at[kept], out_ref.at[row, head, :, some])
    plgpu.wait_smem_to_gmem(0)
