"""Decode kernels on Hopper for plain keys and values of one dtype.

One thread block per (row, KV head, split of its list). A warpgroup multiplies the
queries of a KV head, padded to the 64 rows of a `wgmma`, with blocks of slots that the
copy engine fetches ahead. Each list is split by its own length into equal parts, whose
partial softmaxes one small XLA program merges.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kvjax.pallas_kernels import compat
from kvjax.pallas_kernels.decoding import splits
from kvjax.pallas_kernels.decoding.lanes import transforms
from kvjax.pallas_kernels.partial import Partial, cap
from kvjax.types import NEG_INF

ROWS = 64
"""Rows of a `wgmma`: query heads of a KV head times queries, padded."""

SHARED = 227 * 1024 - 4096
"""Bytes of a thread block, less barriers and padding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A decode step as both ops hand it over.

    Attributes:
        q: `[B, K, X, D]`, all queries of a KV head.
        keys: as they lie in main memory.
        values: likewise.
        walk: of `walks`.
        far: what it reads of main memory, and `bias`, log-weights per slot, by name.
        scale: factor on the products.
        softcap: of the logits, or None.
        stages: blocks in flight, at most.
        splits: of each list.
        interpret: run in the interpreter.
    """

    q: jax.Array
    keys: Any
    values: Any
    walk: Any
    far: Mapping[str, jax.Array]
    scale: float
    softcap: float | None = None
    stages: int
    splits: int
    interpret: bool = False


def refusal(keys: Any, values: Any, rows: int) -> str | None:
    """Why this kernel does not serve a call, or None."""
    if keys.dtype != values.dtype or keys.dtype not in (jnp.bfloat16, jnp.float16):
        return (
            "keys and values must both be bfloat16 or both float16, what `wgmma` "
            f"multiplies; got {keys.dtype} and {values.dtype}"
        )
    if keys.shape[-1] % 16:
        return f"the head dim must be a multiple of 16; got {keys.shape[-1]}"
    if rows > ROWS:
        return f"at most {ROWS} queries per KV head; got {rows}"
    return None


def decode(call: Call) -> Partial:
    """Attention of each KV head's queries, `[B, K, X, D]`."""
    b, kv_heads, rows, d = call.q.shape
    block, dtype = call.walk.block, call.keys.dtype
    # Queries and outputs share what is left by the stages.
    room = SHARED - ROWS * d * (4 + dtype.itemsize)
    stages = max(1, min(call.stages, room // (2 * block * d * dtype.itemsize)))
    queries = call.q.astype(dtype)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, ROWS - rows), (0, 0)))
    kept = -(-rows // 8) * 8
    near = transforms(plgpu.find_swizzle(d * 16), dtype.itemsize)
    copies = block // call.walk.piece
    run = plgpu.kernel(
        functools.partial(
            _kernel,
            names=tuple(call.far),
            walk=call.walk,
            scale=call.scale,
            softcap=call.softcap,
            interpret=call.interpret,
        ),
        out_type=[
            jax.ShapeDtypeStruct((b, kv_heads, call.splits, kept, d), jnp.float32),
            jax.ShapeDtypeStruct((b, kv_heads, call.splits, ROWS), jnp.float32),
        ],
        scratch_types=dict(
            q_near=plgpu.SMEM((ROWS, d), dtype, transforms=near),
            k_near=plgpu.SMEM((stages, block, d), dtype, transforms=near),
            v_near=plgpu.SMEM((stages, block, d), dtype, transforms=near),
            out_near=plgpu.SMEM((ROWS, d), jnp.float32),
            lse_near=plgpu.SMEM((ROWS,), jnp.float32),
            q_here=plgpu.Barrier(),
            k_here=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            v_here=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            done=plgpu.Barrier(),
        ),
        grid=(call.splits, kv_heads, b),
        grid_names=("split", "head", "row"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=512,  # rows are reduced by shuffles
        ),
        interpret=compat.gpu_interpret(call.interpret),
    )
    out, lse = run(queries, call.keys, call.values, *call.far.values())
    return splits.union(out[..., :rows, :], lse[..., :rows])


def _kernel(*refs, names, walk, scale, softcap, interpret, **near):
    """The blocks of one split of one list."""
    q_ref, k_ref, v_ref, *rest = refs
    out_ref, lse_ref = rest[-2:]
    far = dict(zip(names, rest, strict=False))
    weights_ref = far.get("bias")
    q_near, k_near, v_near = near["q_near"], near["k_near"], near["v_near"]
    k_here, v_here, done = near["k_here"], near["v_here"], near["done"]
    split, head, row = (lax.axis_index(name) for name in ("split", "head", "row"))
    stages, block, d = k_near.shape
    parts = out_ref.shape[2]
    first, start, stop = walk.span(far, row, head)
    blocks = lax.div(stop - first + (block - 1), block)
    blocks = jnp.where(stop > start, blocks, 0)
    each = lax.div(blocks + (parts - 1), parts)
    low = split * each
    steps = jnp.maximum(jnp.minimum(low + each, blocks) - low, 0)
    wide = plgpu.Layout.WGMMA
    tall = plgpu.Layout.WGMMA.reduce(1)

    def begin(step):
        return first + (low + step) * block

    def fetch(step, slot):
        for one, index in enumerate(walk.pieces(far, row, head, begin(step))):
            where = index(1)
            k_at, v_at = k_near.at[slot], v_near.at[slot]
            if walk.piece != block:
                to = pl.ds(one * walk.piece, walk.piece)
                k_at, v_at = k_near.at[slot, to], v_near.at[slot, to]
            plgpu.copy_gmem_to_smem(k_ref.at[where], k_at, k_here.at[slot])
            plgpu.copy_gmem_to_smem(v_ref.at[where], v_at, v_here.at[slot])

    plgpu.copy_gmem_to_smem(q_ref.at[row, head], q_near, near["q_here"])
    for slot in range(stages):
        pl.when(slot < steps)(functools.partial(fetch, slot, slot))
    plgpu.barrier_wait(near["q_here"])

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
        if weights_ref is None:
            index = plgpu.broadcasted_iota(jnp.int32, (ROWS, block), 1, layout=wide)
            logits = jnp.where((index >= begins) & (index < ends), logits, NEG_INF)
        else:
            weights = plgpu.load(
                weights_ref.at[row, head, pl.ds(begin(step), block)],
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
        partly = (begins > 0) | (ends < block)

        @pl.when(partly if weights_ref is None else jnp.bool_(True))
        def _():  # what is not held may be NaN, and 0 * NaN is NaN
            for part in range(0, block, ROWS):
                v_at = v_near.at[slot, pl.ds(part, ROWS)]
                value = plgpu.load(v_at, layout=wide)
                if weights_ref is None:
                    index = plgpu.broadcasted_iota(jnp.int32, (ROWS, d), 0, layout=wide)
                    live = (index + part >= begins) & (index + part < ends)
                else:
                    weights = plgpu.load(
                        weights_ref.at[row, head, pl.ds(begin(step) + part, ROWS)],
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
