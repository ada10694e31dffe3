"""`paged_decode` on Hopper: one thread block per (row, KV head, split of its list).

Plain pages of one dtype go through `decoding.plain`, codes and mixtures through
`decoding.coded`. The copy engine fetches each page by a copy of its own, ahead.
"""

import jax.numpy as jnp

from kvjax.pallas_kernels import tuning
from kvjax.pallas_kernels.decoding import coded, plain, walks
from kvjax.pallas_kernels.paged_decode.args import PagedArgs
from kvjax.pallas_kernels.paged_decode.tables import kernel_page, log_weights
from kvjax.pallas_kernels.partial import Partial
from kvjax.types import NEG_INF


def paged_decode(args: PagedArgs, *, tiles=None, interpret=False) -> Partial:
    """See `api.paged_decode`."""
    q, k_pages, v_pages = args.q, args.k_pages, args.v_pages
    selected, counts = args.selected, args.counts
    kernel_page(k_pages.shape[1])
    (b, h, t, d), (_, kv_heads, c) = q.shape, selected.shape
    page, rows = k_pages.shape[1], h // kv_heads * t
    by_registers = coded.wanted(k_pages, v_pages)
    if by_registers:
        why = coded.refusal(q, k_pages, v_pages, rows, ("k_pages", "v_pages"))
    else:
        why = plain.refusal(k_pages, v_pages, rows)
    if plain.ROWS % page and page % plain.ROWS:
        why = f"pages of {page} slots do not fill blocks of {plain.ROWS}"
    if why:
        raise NotImplementedError(f"paged_decode: {why}.")
    tile = tuning.tiles("paged_decode", "h200", tiles)
    block = max(plain.ROWS, tile["slots"] // plain.ROWS * plain.ROWS, page)
    if by_registers:
        block = coded.BLOCK
    pages = block // page
    steps = -(-c // pages)
    # Whole blocks: behind its end a list repeats its last page, which is masked.
    entry = jnp.minimum(jnp.arange(steps * pages), counts[..., None] - 1)
    table = jnp.take_along_axis(selected, jnp.maximum(entry, 0), axis=-1)
    far = {"table": jnp.where(counts[..., None] > 0, table, 0), "counts": counts}
    if args.fill is not None or args.bias is not None:
        weights = log_weights(args)
        short = (steps * pages - c) * page
        wide = [(0, 0), (0, 0), (0, short)]
        far["bias"] = jnp.pad(weights, wide, constant_values=NEG_INF)
    programs = tile["coded_programs" if by_registers else "programs"]
    shared = {
        "q": q.reshape(b, kv_heads, rows, d),
        "keys": k_pages,
        "values": v_pages,
        "walk": walks.Pages(
            heads=kv_heads, entries=steps * pages, page=page, block=block
        ),
        "far": far,
        "scale": args.scale,
        "softcap": args.softcap,
        "splits": max(1, min(programs // (b * kv_heads), steps)),
        "interpret": interpret,
    }
    if by_registers:
        part = coded.decode(coded.Call(**shared, stages=tile["coded_stages"]))
    else:
        part = plain.decode(plain.Call(**shared, stages=tile["stages"]))
    return Partial(part.out.reshape(q.shape), part.lse.reshape(q.shape[:-1]))
