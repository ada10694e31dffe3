"""`page_score` on TPU: one grid step per (row, KV head, block of pages).

Without a softmax each block of pages is finished by itself. With one, the scores of
all heads of a group stay in VMEM until the last block, since the shares of a head need
all of its pages.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kvjax.pallas_kernels import compat, tuning
from kvjax.pallas_kernels.page_score.args import PageArgs
from kvjax.types import NEG_INF

LANES = 128
KEPT_BYTES = 8 << 20
"""Of the scores that wait for a softmax; VMEM of the smallest target is 64 MiB."""


def page_score(args: PageArgs, *, tiles=None, interpret=False) -> Array:
    """See `api.page_score`."""
    q, a, b, row, group = args.q, args.a, args.b, args.row, args.group
    (n, h, t, d), (kv_heads, pages) = q.shape, a.shape[1:3]
    for name, array in (("q", q), ("a", a)):
        if array.dtype == jnp.float16:
            raise NotImplementedError(
                f"page_score: `{name}` is float16, which a TPU does not load."
            )
    block = tuning.tiles("page_score", given=tiles)["pages"]
    block = min(max(block // LANES, 1) * LANES, -(-pages // LANES) * LANES)
    steps = pl.cdiv(pages, block)
    shares = group.startswith("softmax")
    # Rows by token, then head: one token's heads are neighbours. Whole sublanes.
    heads = h // kv_heads
    queries = q.reshape(n, kv_heads, heads, t, d).swapaxes(2, 3)
    queries = queries.reshape(n, kv_heads, t * heads, d)
    rows = -(-t * heads // 8) * 8
    if shares and steps * block * rows * 4 > KEPT_BYTES:
        raise NotImplementedError(
            f"page_score: the scores of {rows} queries and {pages} pages do not fit "
            f"the {KEPT_BYTES >> 20} MiB that wait for a softmax."
        )
    queries = jnp.pad(queries, [(0, 0), (0, 0), (0, rows - t * heads), (0, 0)])
    bounds = [a] if b is None else [a, b]
    if not interpret:
        # Else XLA may copy all bounds into VMEM before the kernel starts.
        bounds = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in bounds]
    out_block = steps * block if shares else block
    lead = jnp.reshape(jnp.int32(0) if row is None else row, 1)

    def out_at(i, k, j, lead):
        del lead
        return i, k, 0, 0 if shares else j

    width = out_block if shares else pages
    moved = [queries, *bounds]
    score = pl.pallas_call(
        functools.partial(
            _kernel,
            bound=args.mode == "bound",
            largest=group.endswith("max"),
            scale=args.scale,
            pages=pages,
            heads=heads,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(n, kv_heads, steps),
            in_specs=[
                pl.BlockSpec((None, None, rows, d), lambda i, k, j, lead: (i, k, 0, 0)),
                *[
                    pl.BlockSpec(
                        (None, None, block, d),
                        lambda i, k, j, lead: (lead[0] + i, k, j, 0),
                    )
                ]
                * len(bounds),
            ],
            out_specs=pl.BlockSpec((None, None, t, out_block), out_at),
            scratch_shapes=[pltpu.VMEM((steps, rows, block), jnp.float32)] * shares,
        ),
        out_shape=jax.ShapeDtypeStruct((n, kv_heads, t, width), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * n * sum(x.size // len(x) for x in bounds),
            transcendentals=n * kv_heads * rows * pages * shares,
            bytes_accessed=sum(x.size * x.dtype.itemsize * n // len(x) for x in moved)
            + 4 * n * kv_heads * t * width,
        ),
        interpret=compat.tpu_interpret(interpret),
        name="page_score",
    )(lead, *moved)
    return score[..., :pages]


def _kernel(_, q_ref, *refs, bound, largest, scale, pages, heads):
    """Scores of a block of pages; with a softmax, those of all pages at the end."""
    a_ref, refs = refs[0], refs[1:]
    q = q_ref[...]
    if bound:
        # Negative channels of a query meet the minimum, positive ones the maximum.
        b_ref, refs = refs[0], refs[1:]
        wide = q.astype(jnp.float32)
        down, up = jnp.minimum(wide, 0.0), jnp.maximum(wide, 0.0)
        score = _product(down.astype(q.dtype), a_ref[...])
        score = score + _product(up.astype(q.dtype), b_ref[...])
    else:
        score = _product(q, a_ref[...])
    out_ref, *kept = refs
    if scale is None:
        out_ref[...] = _combined(score, out_ref.shape[0], heads, largest)
        return
    kept_ref, j = kept[0], pl.program_id(2)
    block = score.shape[1]
    page = j * block + jax.lax.broadcasted_iota(jnp.int32, score.shape, 1)
    kept_ref[j] = jnp.where(page < pages, score * scale, NEG_INF)

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        kept = [kept_ref[i] for i in range(kept_ref.shape[0])]
        peak = functools.reduce(
            jnp.maximum, [jnp.max(x, axis=1, keepdims=True) for x in kept]
        )
        weight = [jnp.exp(x - peak) for x in kept]
        total = sum(jnp.sum(x, axis=1, keepdims=True) for x in weight)
        for i, x in enumerate(weight):
            out_ref[:, i * block : (i + 1) * block] = _combined(
                x / total, out_ref.shape[0], heads, largest
            )


def _combined(score, tokens, heads, largest):
    """`[rows, block]` scores of heads to `[T, block]` scores of their group."""
    merge = jnp.max if largest else jnp.sum
    found = [
        merge(score[i * heads : (i + 1) * heads], axis=0, keepdims=True)
        for i in range(tokens)
    ]
    return found[0] if tokens == 1 else jnp.concatenate(found, axis=0)


def _product(queries, pages):
    if queries.dtype != pages.dtype:
        queries, pages = queries.astype(jnp.float32), pages.astype(jnp.float32)
    exact = jax.lax.Precision.HIGHEST if queries.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        queries,
        pages,
        (((1,), (1,)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )
