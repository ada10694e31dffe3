"""`paged_decode` on TPU: one grid step per (row, KV head, some of its pages).

Each page of a step is an operand of its own, whose block index is read from the
prefetched list of pages: the pipeline copies the pages of the next step, of the next
head too, behind the work of this one. Past the end of a list every operand repeats its
last page, whose copy the pipeline skips.

A TPU copies a page at once only where its rows are whole rows of 128 lanes. XLA keeps
narrower arrays (packed codes, scales, heads of 64) with the pages along the lanes, and
would turn such a pool over before the kernel starts: refused, see `_refuse_copies`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kvjax.pallas_kernels import compat, tuning
from kvjax.pallas_kernels.decoding.sides import LANES
from kvjax.pallas_kernels.paged_decode.args import PagedArgs
from kvjax.pallas_kernels.paged_decode.sides import PageSide
from kvjax.pallas_kernels.paged_decode.tables import kernel_page, log_weights
from kvjax.pallas_kernels.partial import Partial, cap
from kvjax.types import NEG_INF

TABLE_ENTRIES = 1 << 17
"""Of one call: half of the 1 MiB that holds scalars."""


def paged_decode(args: PagedArgs, *, tiles=None, interpret=False) -> Partial:
    """See `api.paged_decode`."""
    q, k_pages, v_pages = args.q, args.k_pages, args.v_pages
    selected, counts, bias = args.selected, args.counts, args.bias
    (b, h, t, d), (_, kv_heads, c) = q.shape, selected.shape
    page = k_pages.shape[1]
    kernel_page(page)
    slots = tuning.tiles("paged_decode", given=tiles)["slots"]
    pages = min(max(1, slots // page), c)
    left = PageSide.of_pool("k_pages", k_pages, pages, q.dtype)
    right = PageSide.of_pool("v_pages", v_pages, pages, q.dtype)
    short = -c % pages
    if args.fill is not None or bias is not None:
        bias = log_weights(args)
        wide = [(0, 0), (0, 0), (0, short * page)]
        bias = jnp.pad(bias, wide, constant_values=NEG_INF)
    selected = jnp.pad(selected, [(0, 0), (0, 0), (0, short)])
    group_rows = h // kv_heads * t
    rows = -(-group_rows // 8) * 8
    queries = q.reshape(b, kv_heads, group_rows, d)
    queries = jnp.pad(queries, [(0, 0), (0, 0), (0, rows - group_rows), (0, 0)])
    arrays = [*left.arrays(k_pages, _lift), *right.arrays(v_pages, _lift)]
    if not interpret:
        _refuse_copies("k_pages", k_pages)
        _refuse_copies("v_pages", v_pages)
        # Else XLA may copy a whole pool into VMEM before the kernel starts.
        arrays = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in arrays]

    def some(batch):
        queries, table, counts, bias = batch
        return _call(
            queries,
            table,
            counts,
            bias,
            arrays,
            left=left,
            right=right,
            live=group_rows,
            scale=args.scale,
            softcap=args.softcap,
            interpret=interpret,
        )

    batch = (queries, repeated(selected, counts, pages), counts, bias)
    if selected.size <= TABLE_ENTRIES:
        out, lse = some(batch)
    else:
        one = functools.partial(jax.tree.map, lambda x: x[None])
        out, lse = jax.lax.map(lambda row: some(one(row)), batch)
        out, lse = out[:, 0], lse[:, 0]
    return Partial(out.reshape(q.shape), lse[..., 0].reshape(q.shape[:-1]))


def _refuse_copies(name, pool):
    """`NotImplementedError` for a pool that XLA would turn over at every call.

    XLA's own gather does so, too, in half of the temporaries. The interpreter, which
    knows no layouts, takes any pool.
    """
    for x in jax.tree.leaves(pool):
        rows, columns = x.shape[1:]
        # A single column puts the pages on the sublanes.
        if columns % LANES and (rows % LANES or columns == 1):
            raise NotImplementedError(
                f"paged_decode: {x.dtype} {list(x.shape)} of `{name}` does not keep a "
                f"page in one piece in the memory of a TPU, and turning it over copies "
                f"the pool at every call. Use rows of {LANES}, or pages of {LANES} "
                "slots with two groups of channels or more."
            )


def _lift(x):
    return x[:, None]


def repeated(selected, counts, pages):
    """The lists with every entry from `counts` on replaced by one that costs nothing.

    Operand `p` of a step reads the entries `p, p + pages, ...`: behind its last live
    one it stays there. An operand without any reads the first page, or page 0.
    """
    b, k, c = selected.shape
    lists = selected.reshape(b, k, c // pages, pages)
    counts = counts[..., None, None]
    step = jnp.arange(c // pages)[:, None]
    last = (counts - 1 - jnp.arange(pages)) // pages  # step of an operand's last entry
    # A sum of one term: XLA's gather of numbers reads a tile of memory for each.
    final = jnp.sum(jnp.where(step == last, lists, 0), axis=2, keepdims=True)
    final = jnp.where(last < 0, lists[:, :, :1, :1], final)
    found = jnp.where(step <= last, lists, final)
    return jnp.where(counts > 0, found, 0).reshape(b, k, c)


def _call(
    queries,
    table,
    counts,
    bias,
    arrays,
    *,
    left,
    right,
    live,
    scale,
    softcap,
    interpret,
):
    """The kernel over a batch whose lists fit the memory for scalars."""
    b, kv_heads, rows, d = queries.shape
    pages, page = left.pages, left.block // left.pages
    steps = table.shape[-1] // pages

    def head(i, k, *_):
        return i, k, 0, 0

    def page_at(i, k, j, table, counts, *, p):
        return table[((i * kv_heads + k) * steps + j) * pages + p], 0, 0

    ats = [functools.partial(page_at, p=p) for p in range(pages)]
    moved, specs = [], []
    for side, first, last in ((left, 0, left.operands), (right, left.operands, None)):
        for array, per_page in zip(
            arrays[first:last],
            zip(*(side.page_specs(at) for at in ats), strict=True),
            strict=True,
        ):
            moved += [array] * pages
            specs += per_page
    if bias is not None:
        moved.append(bias.reshape(b, kv_heads, steps, 1, pages * page))
        specs.append(
            pl.BlockSpec(
                (None, None, None, 1, pages * page),
                lambda i, k, j, *_: (i, k, j, 0, 0),
            )
        )
    wide = [(live, d), (live, LANES)]  # of the rows that are queries
    touched = sum(
        x.size // x.shape[0] * x.dtype.itemsize for x in arrays
    )  # bytes of a page
    return pl.pallas_call(
        functools.partial(
            _kernel,
            left=left,
            right=right,
            biased=bias is not None,
            scale=scale,
            softcap=softcap,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, kv_heads, steps),
            in_specs=[pl.BlockSpec((None, None, rows, d), head), *specs],
            out_specs=[pl.BlockSpec((None, None, *shape), head) for shape in wide],
            scratch_shapes=[
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, d), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((b, kv_heads, *shape), jnp.float32) for shape in wide
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * queries.size * steps * pages * page,
            transcendentals=b * kv_heads * rows * steps * pages * page,
            bytes_accessed=table.size * (touched + 4)
            + queries.size * queries.dtype.itemsize
            + (0 if bias is None else 4 * bias.size)
            + 4 * b * kv_heads * live * (d + LANES),
        ),
        interpret=compat.tpu_interpret(interpret),
        name="paged_decode",
    )(table.reshape(-1), counts.reshape(-1), queries, *moved)


def _kernel(*refs, left, right, biased, scale, softcap):
    """Some pages of one KV head; softmax state in scratch between steps."""
    refs = list(refs)
    _, counts, q_ref = (refs.pop(0) for _ in range(3))
    left_refs = [[refs.pop(0) for _ in range(left.pages)] for _ in range(left.operands)]
    right_refs = [
        [refs.pop(0) for _ in range(right.pages)] for _ in range(right.operands)
    ]
    bias_ref = refs.pop(0) if biased else None
    out_ref, lse_ref, peak_ref, total_ref, acc_ref = refs
    i, k, j = (pl.program_id(axis) for axis in range(3))
    count = counts[i * pl.num_programs(1) + k]
    page = left.block // left.pages

    @pl.when(j == 0)
    def _():
        peak_ref[...] = jnp.full(peak_ref.shape, NEG_INF, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    @pl.when(j * left.pages < count)
    def _():
        slot = jax.lax.broadcasted_iota(jnp.int32, (1, left.block), 1)
        live = j * left.block + slot < count * page
        logits = cap(left.scores(q_ref[...], left_refs) * scale, softcap)
        if bias_ref is not None:
            weight = bias_ref[...]
            live = live & (weight > NEG_INF)
            logits = logits + weight
        logits = jnp.where(live, logits, NEG_INF)
        before = peak_ref[:, :1]
        peak = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        anchor = jnp.where(peak == NEG_INF, 0.0, peak)  # -inf - -inf is NaN
        weight = jnp.exp(logits - anchor)
        fade = jnp.exp(before - anchor)
        total = fade * total_ref[:, :1] + jnp.sum(weight, axis=1, keepdims=True)
        peak_ref[...] = jnp.broadcast_to(peak, peak_ref.shape)
        total_ref[...] = jnp.broadcast_to(total, total_ref.shape)
        acc_ref[...] = fade * acc_ref[...] + right.mix(weight, live, right_refs)

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        total = total_ref[:, :1]
        safe = jnp.where(total > 0, total, 1.0)
        out_ref[...] = (acc_ref[...] / safe)[: out_ref.shape[0]]
        lse = jnp.where(total > 0, peak_ref[:, :1] + jnp.log(safe), NEG_INF)
        lse_ref[...] = jnp.broadcast_to(lse[: lse_ref.shape[0]], lse_ref.shape)
