"""`paged_decode` on Hopper: one thread block per (row, KV head, split of its list).

A warpgroup multiplies the queries of a KV head, padded to the 64 rows of a `wgmma`,
with blocks of pages. The copy engine fetches each page by a copy of its own, ahead.
Each list is split by its own length into equal parts, whose partial softmaxes one
small XLA program merges.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kvjax.pallas_kernels import compat, tuning
from kvjax.pallas_kernels.paged_decode.tables import kernel_page, log_weights, merged
from kvjax.pallas_kernels.partial import Partial, cap
from kvjax.pallas_kernels.quantized import Quantized
from kvjax.types import NEG_INF

ROWS = 64
"""Rows of a `wgmma`: query heads of a KV head times queries, padded."""


def paged_decode(
    q,
    k_pages,
    v_pages,
    selected,
    counts,
    *,
    fill=None,
    bias=None,
    scale,
    softcap=None,
    tiles=None,
    interpret=False,
):
    """See `api.paged_decode`."""
    kernel_page(k_pages.shape[1])
    _refuse(q, k_pages, v_pages, selected)
    (b, h, t, d), (_, kv_heads, c) = q.shape, selected.shape
    page, dtype = k_pages.shape[1], k_pages.dtype
    tile = tuning.tiles("paged_decode", "h200", tiles)
    block = max(ROWS, tile["slots"] // ROWS * ROWS, page)
    pages, stages = block // page, tile["stages"]
    steps = -(-c // pages)
    splits = max(1, min(tile["programs"] // (b * kv_heads), steps))

    rows = h // kv_heads * t
    queries = q.astype(dtype).reshape(b, kv_heads, rows, d)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, ROWS - rows), (0, 0)))
    # Whole blocks: behind its end a list repeats its last page, which is masked.
    entry = jnp.minimum(jnp.arange(steps * pages), counts[..., None] - 1)
    table = jnp.take_along_axis(selected, jnp.maximum(entry, 0), axis=-1)
    moved = [queries, k_pages, v_pages, table, counts]
    if fill is not None or bias is not None:
        weights = log_weights(selected, counts, fill, bias, page)
        short = (steps * pages - c) * page
        wide = [(0, 0), (0, 0), (0, short)]
        moved.append(jnp.pad(weights, wide, constant_values=NEG_INF))

    swizzle = plgpu.find_swizzle(d * 16)
    near = (
        plgpu.TilingTransform((8, swizzle // 2)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
    )
    kept = -(-rows // 8) * 8
    run = plgpu.kernel(
        functools.partial(
            _kernel,
            biased=len(moved) == 6,
            page=page,
            scale=scale,
            softcap=softcap,
            interpret=interpret,
        ),
        out_type=[
            jax.ShapeDtypeStruct((b, kv_heads, splits, kept, d), jnp.float32),
            jax.ShapeDtypeStruct((b, kv_heads, splits, ROWS), jnp.float32),
        ],
        scratch_types=dict(
            q_near=plgpu.SMEM((ROWS, d), dtype, transforms=near),
            k_near=plgpu.SMEM((stages, block, d), dtype, transforms=near),
            v_near=plgpu.SMEM((stages, block, d), dtype, transforms=near),
            out_near=plgpu.SMEM((ROWS, d), jnp.float32),
            lse_near=plgpu.SMEM((ROWS,), jnp.float32),
            q_here=plgpu.Barrier(),
            k_here=plgpu.Barrier(num_arrivals=pages, num_barriers=stages),
            v_here=plgpu.Barrier(num_arrivals=pages, num_barriers=stages),
            done=plgpu.Barrier(),
        ),
        grid=(splits, kv_heads, b),
        grid_names=("split", "head", "row"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=compat.gpu_interpret(interpret),
    )
    out, lse = run(*moved)
    part = merged(out[..., :rows, :], lse[..., :rows])
    return Partial(part.out.reshape(q.shape), part.lse.reshape(q.shape[:-1]))


def _refuse(q, k_pages, v_pages, selected) -> None:
    """`NotImplementedError` for what the kernel does not do."""
    why = None
    if isinstance(k_pages, Quantized) or isinstance(v_pages, Quantized):
        why = "codes are not implemented for this backend"
    elif k_pages.dtype != v_pages.dtype or k_pages.dtype == jnp.float32:
        why = (
            "keys and values must both be bfloat16 or both float16, what `wgmma` "
            f"multiplies; got {k_pages.dtype} and {v_pages.dtype}"
        )
    elif ROWS % k_pages.shape[1] and k_pages.shape[1] % ROWS:
        why = f"pages of {k_pages.shape[1]} slots do not fill blocks of {ROWS}"
    elif q.shape[3] % 16:
        why = f"the head dim must be a multiple of 16; got {q.shape[3]}"
    elif (rows := q.shape[1] // selected.shape[1] * q.shape[2]) > ROWS:
        why = f"at most {ROWS} queries per KV head; got {rows}"
    if why:
        raise NotImplementedError(f"paged_decode: {why}.")


def _kernel(*refs, biased, page, scale, softcap, interpret, **near):
    """The blocks of pages of one split of one list."""
    q_ref, k_ref, v_ref, table_ref, counts_ref, *refs = refs
    weights_ref = refs.pop(0) if biased else None
    out_ref, lse_ref = refs
    q_near, k_near, v_near = near["q_near"], near["k_near"], near["v_near"]
    k_here, v_here, done = near["k_here"], near["v_here"], near["done"]
    split, head, row = (lax.axis_index(name) for name in ("split", "head", "row"))
    stages, block, d = k_near.shape
    pages, splits = block // page, out_ref.shape[2]
    count = counts_ref[row, head]
    blocks = lax.div(count + (pages - 1), pages)
    each = lax.div(blocks + (splits - 1), splits)
    low = split * each
    steps = jnp.maximum(jnp.minimum(low + each, blocks) - low, 0)
    wide = plgpu.Layout.WGMMA
    tall = plgpu.Layout.WGMMA.reduce(1)

    def fetch(step, slot):
        for one in range(pages):
            at = table_ref[row, head, (low + step) * pages + one]
            to = pl.ds(one * page, page)
            k_at, v_at = k_near.at[slot, to], v_near.at[slot, to]
            plgpu.copy_gmem_to_smem(k_ref.at[at], k_at, k_here.at[slot])
            plgpu.copy_gmem_to_smem(v_ref.at[at], v_at, v_here.at[slot])

    plgpu.copy_gmem_to_smem(q_ref.at[row, head], q_near, near["q_here"])
    for slot in range(stages):
        pl.when(slot < steps)(functools.partial(fetch, slot, slot))
    plgpu.barrier_wait(near["q_here"])

    def body(step, state):
        acc, peak, total = state
        slot = lax.rem(step, stages)
        first = (low + step) * block
        left = count * page - first  # slots of this block, or more
        plgpu.barrier_wait(k_here.at[slot])

        def score(ref):
            plgpu.wgmma(ref, q_near, k_near.at[slot].transpose((1, 0)))
            return ref[...]

        logits = pl.run_scoped(
            score, plgpu.WGMMAAccumulatorRef((ROWS, block), jnp.float32)
        )
        logits = cap(logits * scale, softcap)
        if weights_ref is None:
            index = plgpu.broadcasted_iota(jnp.int32, (ROWS, block), 1, layout=wide)
            logits = jnp.where(index < left, logits, NEG_INF)
        else:
            weights = plgpu.load(
                weights_ref.at[row, head, pl.ds(first, block)],
                layout=plgpu.Layout.WGMMA.reduce(0),
                optimized=False,
            )
            weights = lax.broadcast_in_dim(weights, (ROWS, block), [1])
            # A hidden key may be NaN, and NaN + -inf is NaN.
            logits = jnp.where(weights > NEG_INF, logits + weights, NEG_INF)
        higher = jnp.maximum(peak, jnp.max(logits, axis=1))
        # A block may be hidden as a whole, and -inf - -inf is NaN.
        anchor = jnp.where(higher > NEG_INF, higher, jnp.zeros_like(higher))
        fade = jnp.exp(peak - anchor)
        weight = jnp.exp(logits - lax.broadcast_in_dim(anchor, logits.shape, [0]))
        total = total * fade + jnp.sum(weight, axis=1)
        acc = acc * lax.broadcast_in_dim(fade, acc.shape, [0])
        plgpu.barrier_wait(v_here.at[slot])

        @pl.when((left < block) | biased)
        def _():  # free slots may hold NaN, and 0 * NaN is NaN
            for part in range(0, block, ROWS):
                v_at = v_near.at[slot, pl.ds(part, ROWS)]
                value = plgpu.load(v_at, layout=wide)
                if weights_ref is None:
                    index = plgpu.broadcasted_iota(jnp.int32, (ROWS, d), 0, layout=wide)
                    live = index + part < left
                else:
                    weights = plgpu.load(
                        weights_ref.at[row, head, pl.ds(first + part, ROWS)],
                        layout=tall,
                        optimized=False,
                    )
                    live = lax.broadcast_in_dim(weights, (ROWS, d), [0]) > NEG_INF
                v_at[...] = jnp.where(live, value, jnp.zeros_like(value))
            plgpu.commit_smem()

        def add(ref):
            plgpu.wgmma(ref, weight.astype(v_near.dtype), v_near.at[slot])

        if interpret:  # it knows no `run_state`, and `wgmma` of shared memory only
            low_weight = weight.astype(v_near.dtype).astype(jnp.float32)
            acc = acc + low_weight @ v_near[slot].astype(jnp.float32)
        else:
            acc = pl.run_state(add)(plgpu.WGMMAAccumulatorRef.init(acc))
        # All warps must have read the block before the next one overwrites it.
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)
        pl.when(step + stages < steps)(lambda: fetch(step + stages, slot))
        return acc, higher, total

    def filled(shape, value, layout):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    nothing = filled((ROWS, d), 0.0, wide), filled((ROWS,), NEG_INF, tall)
    state = (*nothing, filled((ROWS,), 0.0, tall))
    acc, peak, total = lax.fori_loop(0, steps, body, state)
    safe = jnp.where(total > 0, total, jnp.ones_like(total))
    near["out_near"][...] = acc / lax.broadcast_in_dim(safe, acc.shape, [0])
    near["lse_near"][...] = jnp.where(
        total > 0, peak + jnp.log(safe), jnp.full_like(peak, NEG_INF)
    )
    plgpu.commit_smem()
    kept = pl.ds(0, out_ref.shape[3])
    out_at, lse_at = out_ref.at[row, head, split], lse_ref.at[row, head, split]
    plgpu.copy_smem_to_gmem(near["out_near"].at[kept], out_at)
    plgpu.copy_smem_to_gmem(near["lse_near"], lse_at)
    plgpu.wait_smem_to_gmem(0)
