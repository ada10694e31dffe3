"""`decode_attention` on Hopper: a thread block per (row, KV head, split of its slots).

A warpgroup multiplies the queries of a KV head, padded to the 64 rows of a `wgmma`,
with blocks of slots that the copy engine fetches ahead. Each head is split by its own
length into equal parts, whose partial softmaxes one small XLA program merges. Blocks
start at the head's first slot, rounded down to 8 (what tiles in shared memory want):
only the first and the last are masked.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kvjax.pallas_kernels import compat, tuning
from kvjax.pallas_kernels.decoding import coded, walks
from kvjax.pallas_kernels.partial import Partial, cap
from kvjax.pallas_kernels.quantized import Quantized
from kvjax.types import NEG_INF

ROWS = 64
"""Rows of a `wgmma`: query heads of a KV head times queries, padded."""


_SHARED = 227 * 1024 - 4096  # bytes per thread block, less barriers and padding


def decode_attention(
    q,
    keys,
    values,
    lengths,
    *,
    offsets=None,
    positions=None,
    q_positions=None,
    scale,
    window=None,
    softcap=None,
    tiles=None,
    interpret=False,
):
    """See `api.decode_attention`."""
    (b, h, t, d), kv_heads = q.shape, lengths.shape[1]
    slots = keys.shape[-2]
    tile = tuning.tiles("decode_attention", "h200", tiles)
    start = jnp.zeros_like(lengths) if offsets is None else offsets[:, :-1]
    stop = jnp.clip(start + lengths, start, slots)
    if coded.wanted(keys, values) or positions is not None:
        rows = h // kv_heads * t
        why = coded.refusal(keys, values, rows, ("keys", "values"))
        if why:
            raise NotImplementedError(f"decode_attention: {why}.")
        far = {"start": start, "stop": stop}
        now = None
        if positions is not None:
            far["positions"] = positions
            now = jnp.tile(q_positions, (1, h // kv_heads))
        call = coded.Call(
            q=q.reshape(b, kv_heads, rows, d),
            keys=keys,
            values=values,
            walk=walks.Slots(heads=kv_heads, slots=slots, ragged=offsets is not None),
            far=far,
            now=now,
            scale=scale,
            window=window,
            softcap=softcap,
            stages=4,
            splits=max(1, min(396 // (b * kv_heads), -(-slots // 128))),
            interpret=interpret,
        )
        part = coded.decode(call)
        return Partial(part.out.reshape(q.shape), part.lse.reshape(q.shape[:-1]))
    _refuse(q, keys, values, lengths, positions)
    dtype = keys.dtype
    block, stages = tile["block"], tile["stages"]
    # Queries and outputs share what is left by the stages.
    room = _SHARED - ROWS * d * (4 + dtype.itemsize)
    stages = max(1, min(stages, room // (2 * block * d * dtype.itemsize)))
    splits = max(1, min(tile["programs"] // (b * kv_heads), -(-slots // block)))

    rows = h // kv_heads * t
    queries = q.astype(dtype).reshape(b, kv_heads, rows, d)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, ROWS - rows), (0, 0)))

    kept = -(-rows // 8) * 8
    swizzle = plgpu.find_swizzle(d * 16)
    near = (
        plgpu.TilingTransform((8, swizzle // 2)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
    )
    run = plgpu.kernel(
        functools.partial(
            _kernel,
            ragged=offsets is not None,
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
            k_here=plgpu.Barrier(num_barriers=stages),
            v_here=plgpu.Barrier(num_barriers=stages),
            done=plgpu.Barrier(),
        ),
        grid=(splits, kv_heads, b),
        grid_names=("split", "head", "row"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=compat.gpu_interpret(interpret),
    )
    out, lse = run(queries, keys, values, start, stop)
    return _merged(out[..., :rows, :], lse[..., :rows], q.shape)


def _refuse(q, keys, values, lengths, positions) -> None:
    """`NotImplementedError` for what the kernel does not do."""
    why = None
    if isinstance(keys, Quantized) or isinstance(values, Quantized):
        why = "codes are not implemented for this backend"
    elif keys.dtype != values.dtype or keys.dtype not in (jnp.bfloat16, jnp.float16):
        why = (
            "keys and values must both be bfloat16 or both float16, what `wgmma` "
            f"multiplies; got {keys.dtype} and {values.dtype}"
        )
    elif positions is not None:
        why = "positions are not implemented for this backend"
    elif keys.shape[-2] % 8:
        why = f"the slots must be a multiple of 8; got {keys.shape[-2]}"
    elif q.shape[3] % 16:
        why = f"the head dim must be a multiple of 16; got {q.shape[3]}"
    elif (rows := q.shape[1] // lengths.shape[1] * q.shape[2]) > ROWS:
        why = f"at most {ROWS} queries per KV head; got {rows}"
    if why:
        raise NotImplementedError(f"decode_attention: {why}.")


def _merged(out, lse, shape) -> Partial:
    """The exact union of the splits, axis 2 of `out [B, K, P, X, D]`."""
    peak = jnp.max(lse, axis=2, keepdims=True)
    anchor = jnp.where(jnp.isneginf(peak), 0.0, peak)  # -inf - -inf is NaN
    weight = jnp.exp(lse - anchor)
    total = jnp.sum(weight, axis=2)
    safe = jnp.where(total > 0, total, 1.0)
    out = jnp.sum(weight[..., None] * out, axis=2) / safe[..., None]
    lse = jnp.where(total > 0, anchor[:, :, 0] + jnp.log(safe), NEG_INF)
    return Partial(out.reshape(shape), lse.reshape(shape[:-1]))


def _kernel(
    q_ref,
    k_ref,
    v_ref,
    start_ref,
    stop_ref,
    out_ref,
    lse_ref,
    *,
    q_near,
    k_near,
    v_near,
    out_near,
    lse_near,
    q_here,
    k_here,
    v_here,
    done,
    ragged,
    scale,
    softcap,
    interpret,
):
    """The slots of one split of one head."""
    split, head, row = (lax.axis_index(name) for name in ("split", "head", "row"))
    stages, block, d = k_near.shape
    splits = out_ref.shape[2]
    start, stop = start_ref[row, head], stop_ref[row, head]
    first = lax.div(start, 8) * 8
    blocks = lax.div(stop - first + (block - 1), block)
    blocks = jnp.where(stop > start, blocks, 0)
    each = lax.div(blocks + (splits - 1), splits)
    low = split * each
    steps = jnp.maximum(jnp.minimum(low + each, blocks) - low, 0)
    wide = plgpu.Layout.WGMMA
    tall = plgpu.Layout.WGMMA.reduce(1)

    def begin(step):
        return pl.multiple_of(first + (low + step) * block, 8)

    def fetch(step, slot):
        some = pl.ds(begin(step), block)
        where = (row, some) if ragged else (row, head, some)
        plgpu.copy_gmem_to_smem(k_ref.at[where], k_near.at[slot], k_here.at[slot])
        plgpu.copy_gmem_to_smem(v_ref.at[where], v_near.at[slot], v_here.at[slot])

    plgpu.copy_gmem_to_smem(q_ref.at[row, head], q_near, q_here)
    for slot in range(stages):
        pl.when(slot < steps)(functools.partial(fetch, slot, slot))
    plgpu.barrier_wait(q_here)

    def body(step, state):
        acc, peak, total = state
        slot = lax.rem(step, stages)
        begins, ends = start - begin(step), stop - begin(step)
        plgpu.barrier_wait(k_here.at[slot])

        def score(ref):
            plgpu.wgmma(ref, q_near, k_near.at[slot].transpose((1, 0)))
            return ref[...]

        logits = pl.run_scoped(
            score, plgpu.WGMMAAccumulatorRef((ROWS, block), jnp.float32)
        )
        logits = cap(logits * scale, softcap)
        index = plgpu.broadcasted_iota(jnp.int32, (ROWS, block), 1, layout=wide)
        logits = jnp.where((index >= begins) & (index < ends), logits, NEG_INF)
        higher = jnp.maximum(peak, jnp.max(logits, axis=1))  # a block holds a slot
        fade = jnp.exp(peak - higher)
        weight = jnp.exp(logits - lax.broadcast_in_dim(higher, logits.shape, [0]))
        total = total * fade + jnp.sum(weight, axis=1)
        acc = acc * lax.broadcast_in_dim(fade, acc.shape, [0])

        plgpu.barrier_wait(v_here.at[slot])

        @pl.when((begins > 0) | (ends < block))
        def _():  # what is not held may be NaN, and 0 * NaN is NaN
            for part in range(0, block, ROWS):
                near = v_near.at[slot, pl.ds(part, ROWS)]
                index = plgpu.broadcasted_iota(jnp.int32, (ROWS, d), 0, layout=wide)
                held = (index + part >= begins) & (index + part < ends)
                value = plgpu.load(near, layout=wide)
                near[...] = jnp.where(held, value, jnp.zeros_like(value))
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

    acc, peak, total = lax.fori_loop(
        0,
        steps,
        body,
        (
            filled((ROWS, d), 0.0, wide),
            filled((ROWS,), NEG_INF, tall),
            filled((ROWS,), 0.0, tall),
        ),
    )
    safe = jnp.where(total > 0, total, jnp.ones_like(total))
    out_near[...] = acc / lax.broadcast_in_dim(safe, acc.shape, [0])
    lse_near[...] = jnp.where(
        total > 0, peak + jnp.log(safe), jnp.full_like(peak, NEG_INF)
    )
    plgpu.commit_smem()
    kept = pl.ds(0, out_ref.shape[3])
    plgpu.copy_smem_to_gmem(out_near.at[kept], out_ref.at[row, head, split])
    plgpu.copy_smem_to_gmem(lse_near, lse_ref.at[row, head, split])
    plgpu.wait_smem_to_gmem(0)
