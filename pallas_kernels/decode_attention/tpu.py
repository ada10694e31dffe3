"""`decode_attention` on TPU: one grid step per (row, KV head, block of slots).

The grid is as long as the longest head; shorter heads repeat their last block, whose
copy the pipeline then skips. Arrays whose last axis is no multiple of 128 lie in HBM
with the slots along the lanes (XLA's own choice, nothing is padded), so their blocks
are read transposed: `columns` below. Codes are multiplied as they are: scales and
zeros meet the queries, scores, probabilities or outputs, see `sides`. The rows of a
layer are blocks of the stack of all layers; only scales that XLA turns over beforehand
are sliced out of it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kvjax.pallas_kernels import compat, stacked, tuning
from kvjax.pallas_kernels.decode_attention.args import DecodeArgs
from kvjax.pallas_kernels.decoding import sides
from kvjax.pallas_kernels.partial import Partial, cap
from kvjax.types import NEG_INF

LANES = 128


def decode_attention(args: DecodeArgs, *, tiles=None, interpret=False) -> Partial:
    """See `api.decode_attention`."""
    q, lengths, offsets, positions = args.q, args.lengths, args.offsets, args.positions
    (b, h, t, d), kv_heads = q.shape, lengths.shape[1]
    slots = args.keys.shape[-2]
    block = tuning.tiles("decode_attention", given=tiles)["block"]
    block = min(block, -(-slots // LANES) * LANES)
    left = sides.Side.of("keys", args.keys, block, q.dtype)
    right = sides.Side.of("values", args.values, block, q.dtype)

    start = jnp.zeros_like(lengths) if offsets is None else offsets[:, :-1]
    stop = jnp.clip(start + lengths, start, slots)
    first = start // block
    count = jnp.where(stop > start, -(-stop // block) - first, 0)
    first = jnp.minimum(first, (slots - 1) // block)
    lead = jnp.reshape(jnp.int32(0) if args.row is None else args.row, 1)
    scalars = [first, count, lead, start, stop]
    if args.q_positions is not None:
        scalars.append(args.q_positions)

    group_rows = h // kv_heads * t
    rows = -(-group_rows // 8) * 8
    queries = q.reshape(b, kv_heads, group_rows, d)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, rows - group_rows), (0, 0)))

    def own(i, k, j, first, count, *_):
        """Block of step `j`; past the last one the last, whose copy is skipped."""
        here = first[i, k] + jnp.minimum(j, jnp.maximum(count[i, k] - 1, 0))
        return i, k if offsets is None else 0, here

    def at(*grid):
        (i, k, here), lead = own(*grid), grid[5]
        return lead[0] + i, k, here

    def per_head(i, k, *_):
        return i, k, 0, 0

    lift = (lambda x: x) if offsets is None else (lambda x: x[:, None])
    few = functools.partial(stacked.rows, row=args.row, count=b)
    arrays = [*left.arrays(args.keys, lift, few), *right.arrays(args.values, lift, few)]
    specs = [*left.specs(at, own), *right.specs(at, own)]
    if positions is not None:
        arrays.append(lift(positions)[:, :, None])
        specs.append(
            pl.BlockSpec((None, None, 1, block), lambda *g: (*at(*g)[:2], 0, at(*g)[2]))
        )
    out_shape = [(b, kv_heads, rows, d), (b, kv_heads, rows, LANES)]
    spread = (rows, LANES)
    if not interpret:
        # Else XLA may copy a whole cache into VMEM before the kernel starts.
        arrays = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in arrays]
    moved = [queries, *arrays]
    out, lse = pl.pallas_call(
        functools.partial(
            _kernel,
            left=left,
            right=right,
            tokens=t if positions is not None else 0,
            scale=args.scale,
            window=args.window,
            softcap=args.softcap,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(b, kv_heads, jnp.maximum(jnp.max(count), 1)),
            in_specs=[pl.BlockSpec((None, None, rows, d), per_head), *specs],
            out_specs=[pl.BlockSpec((None, None, *s[2:]), per_head) for s in out_shape],
            scratch_shapes=[
                pltpu.VMEM(spread, jnp.float32),
                pltpu.VMEM(spread, jnp.float32),
                pltpu.VMEM((rows, d), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(s, jnp.float32) for s in out_shape],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
        ),
        # Every head full: what the lengths leave out is known only at run time.
        cost_estimate=pl.CostEstimate(
            flops=4 * b * h * t * slots * d,
            transcendentals=b * h * t * slots,
            bytes_accessed=sum(x.size * x.dtype.itemsize * b // len(x) for x in moved)
            + sum(4 * b * kv_heads * s[2] * s[3] for s in out_shape),
        ),
        interpret=compat.tpu_interpret(interpret),
        name="decode_attention",
    )(*scalars, *moved)
    out, lse = out[:, :, :group_rows], lse[:, :, :group_rows, 0]
    return Partial(out.reshape(q.shape), lse.reshape(q.shape[:-1]))


def _kernel(*refs, left, right, tokens, scale, window, softcap):
    """One block of one KV head; softmax state in scratch between blocks."""
    refs = list(refs)
    first, count, _, start, stop = (refs.pop(0) for _ in range(5))
    q_positions = refs.pop(0) if tokens else None
    q_ref = refs.pop(0)
    left_refs = [refs.pop(0) for _ in range(left.operands)]
    right_refs = [refs.pop(0) for _ in range(right.operands)]
    pos_ref = refs.pop(0) if tokens else None
    out_ref, lse_ref, peak_ref, total_ref, acc_ref = refs
    i, k, j = (pl.program_id(axis) for axis in range(3))
    rows, block = q_ref.shape[0], left.block

    @pl.when(j == 0)
    def _():
        peak_ref[...] = jnp.full(peak_ref.shape, NEG_INF, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    @pl.when(j < count[i, k])
    def _():
        lane = jax.lax.broadcasted_iota(jnp.int32, (rows, block), 1)
        slot = (first[i, k] + j) * block + lane
        seen = (slot >= start[i, k]) & (slot < stop[i, k])
        if pos_ref is not None and q_positions is not None:
            at = pos_ref[...]
            row = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
            now = jnp.full((rows, 1), q_positions[i, 0])
            for one in range(1, tokens):
                now = jnp.where(row % tokens == one, q_positions[i, one], now)
            seen = seen & (at >= 0) & (at <= now)
            if window is not None:
                seen = seen & (now - at < window)
        logits = cap(left.scores(q_ref[...], left_refs) * scale, softcap)
        logits = jnp.where(seen, logits, NEG_INF)
        before = peak_ref[:, :1]
        peak = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        anchor = jnp.where(peak == NEG_INF, 0.0, peak)  # -inf - -inf is NaN
        weight = jnp.exp(logits - anchor)
        fade = jnp.exp(before - anchor)
        total = fade * total_ref[:, :1] + jnp.sum(weight, axis=1, keepdims=True)
        peak_ref[...] = jnp.broadcast_to(peak, peak_ref.shape)
        total_ref[...] = jnp.broadcast_to(total, total_ref.shape)
        live = jnp.max(seen.astype(jnp.float32), axis=0, keepdims=True) > 0
        acc_ref[...] = fade * acc_ref[...] + right.mix(weight, live, right_refs)

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        total = total_ref[:, :1]
        safe = jnp.where(total > 0, total, 1.0)
        out_ref[...] = acc_ref[...] / safe
        lse = jnp.where(total > 0, peak_ref[:, :1] + jnp.log(safe), NEG_INF)
        lse_ref[...] = jnp.broadcast_to(lse, lse_ref.shape)
