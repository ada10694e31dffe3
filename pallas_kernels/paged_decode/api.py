"""`paged_decode`: validation and dispatch."""

import functools
from typing import Any

from jaxtyping import Array, Float, Int

from kvjax.pallas_kernels import checks
from kvjax.pallas_kernels.dispatch import Backend, Op, Tiles
from kvjax.pallas_kernels.gradients import through
from kvjax.pallas_kernels.paged_decode.args import PagedArgs
from kvjax.pallas_kernels.partial import Partial
from kvjax.pallas_kernels.quantized import BITS, Quantized

OP = Op(name="paged_decode", backends=("reference", "xla", "tpu", "gpu"))

MOST_QUERIES = 16


def paged_decode(
    q: Float[Array, "B H T D"],
    k_pages: Float[Array, "N P D"] | Quantized,
    v_pages: Float[Array, "N P D"] | Quantized,
    selected: Int[Array, "B K C"],
    counts: Int[Array, "B K"],
    *,
    fill: Int[Array, "B K C"] | None = None,
    bias: Float[Array, "B K C*P"] | None = None,
    scale: float,
    softcap: float | None = None,
    backend: Backend = "auto",
    tiles: Tiles = None,
    interpret: bool = False,
) -> Partial:
    """Partial attention of each query over the pages that its KV head selects.

    One page holds `P` slots of one KV head. Other layouts are views of the pool: a
    pool `[pages, K, P, D]` is `[pages * K, P, D]` and its page `page * K + k`; a cache
    `[B, K, S, D]` is `[B * K * S / P, P, D]` and its page `(b * K + k) * S / P + p`.
    With `selected` the whole page table this is ordinary paged attention.

    Args:
        q: queries after RoPE, `[B, H, T, D]`, `T` of 16 at most; `H` is a multiple of
            `K`. Every query of a row sees every live slot.
        k_pages: keys, `[N, P, D]` f32 or bf16, or `Quantized` with codes
            `[N, P, D * bits / 8]`, whose groups of slots divide `P`. Scales and zeros
            are the int16 bits of float16 numbers, or (a copy on a TPU) float16.
        v_pages: values, likewise; plain and quantised, bits, axes and groups may
            differ from those of the keys.
        selected: pages each KV head reads, `[B, K, C]` int32. Entries from `counts`
            on are ignored and may be anything.
        counts: pages that are read, `[B, K]` int32, in `0 .. C`.
        fill: live slots of each selected page, its first ones, `[B, K, C]` int32;
            None: all `P`. What other slots hold, NaN included, does not matter.
        bias: log-weight added to the logits of each slot, `[B, K, C * P]` f32, in the
            order of `selected`: log(n) counts a slot n times, -inf hides it.
        scale: factor on `q . k`.
        softcap: logit soft cap, or None; the bias is added behind it.
        backend: see `dispatch.Op`.
        tiles: `{"slots": slots per step}`, rounded down to whole pages.
        interpret: run a Pallas backend in its interpreter.

    Returns:
        `Partial(out [B, H, T, D] f32, lse [B, H, T] f32)`; 0 and -inf where a head
        reads nothing. Differentiable in `q`, `bias` and plain pages: the gradient is
        the reference's, which is computed again for it.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit.
        NotImplementedError: the chosen backend does not serve this case.

    Cost: reads the selected pages once, codes and scales, and 4 bytes per slot of
        `bias` (or of `fill`, which becomes one). A TPU would copy whole arrays
        of the pool at every call where XLA does not keep a page in one piece: where
        rows are no multiple of 128 (channels, bytes of codes, scales) and there are
        not 128 of them, or one scale per slot. The kernel refuses these.

    Source: the read of Quest (2406.10774) section 3.3; with the bias, the estimation
        zone of RetroInfer (2505.02922).
    """
    args = PagedArgs(
        q=q,
        k_pages=k_pages,
        v_pages=v_pages,
        selected=selected,
        counts=counts,
        fill=fill,
        bias=bias,
        scale=scale,
        softcap=softcap,
    )
    check(args)

    def run(args, **how):  # a name for traces, which `OP` has not
        return OP(args, **how)

    return through(
        functools.partial(run, backend=backend, tiles=tiles, interpret=interpret),
        functools.partial(run, backend="reference"),
        args,
    )


def check(args: PagedArgs) -> None:
    """Refuse what does not fit together."""
    q, selected, counts, bias = args.q, args.selected, args.counts, args.bias
    checks.dtype("q", q)
    if q.ndim != 4 or not 1 <= q.shape[2] <= MOST_QUERIES:
        raise ValueError(
            f"`q` must be [B, H, T, D] with T in 1 .. {MOST_QUERIES}; got "
            f"{list(q.shape)}. Use an attention for prefill for more queries."
        )
    b, h, _, d = q.shape
    if selected.ndim != 3:
        raise ValueError(f"`selected` must be [B, K, C]; got {list(selected.shape)}.")
    kv_heads, c = selected.shape[1:]
    checks.group(h, kv_heads)
    sizes = {"B": b, "K": kv_heads, "C": c, "D": d}
    for name, array in (("selected", selected), ("fill", args.fill)):
        if array is not None:
            checks.shape(name, array, ("B", "K", "C"), **sizes)
            checks.integers(name, array)
    checks.shape("counts", counts, ("B", "K"), **sizes)
    checks.integers("counts", counts)
    n, page = check_pool("k_pages", args.k_pages, d)
    if (n, page) != check_pool("v_pages", args.v_pages, d):
        raise ValueError(
            f"`v_pages` must hold as many pages and slots as `k_pages`, [N, P, D] = "
            f"{[n, page, d]}; got {list(args.v_pages.shape)}."
        )
    if bias is not None:
        checks.shape("bias", bias, ("B", "K", "C*P"), **sizes, **{"C*P": c * page})
        checks.dtype("bias", bias, ("float32",))


def check_pool(name: str, pool: Any, d: int) -> tuple[int, int]:
    """Number of pages and slots per page of a pool that is in order."""
    codes = pool.codes if isinstance(pool, Quantized) else pool
    if codes.ndim != 3:
        raise ValueError(
            f"`{name}` must be [N, P, D]; got {list(codes.shape)}. View a pool "
            "[pages, K, P, D] as [pages * K, P, D]."
        )
    n, page = codes.shape[:2]
    if n < 1 or page < 1:
        raise ValueError(
            f"`{name}` must hold pages of at least one slot; got [N, P] = {[n, page]}."
        )
    if isinstance(pool, Quantized):
        check_quantized(name, pool, n, page, d)
    else:
        checks.shape(name, pool, ("N", "P", "D"), D=d)
        checks.dtype(name, pool)
    return n, page


def check_quantized(name: str, pool: Quantized, n: int, page: int, d: int) -> None:
    """Refuse codes, scales or settings that do not describe `[n, page, d]`."""
    if pool.bits not in BITS or d % (8 // pool.bits):
        raise ValueError(
            f"`{name}.bits` must be 1, 2, 4 or 8 with D={d} a multiple of the codes "
            f"per byte; got {pool.bits}."
        )
    checks.shape(f"{name}.codes", pool.codes, (n, page, d * pool.bits // 8))
    checks.dtype(f"{name}.codes", pool.codes, ("uint8",))
    if pool.axis not in ("channel", "token"):
        raise ValueError(
            f"`{name}.axis` must be 'channel' or 'token'; got {pool.axis!r}."
        )
    whole, of = (page, "slots of a page") if pool.axis == "channel" else (d, "channels")
    if pool.group < 1 or whole % pool.group:
        raise ValueError(
            f"`{name}.group` must divide the {whole} {of}; got {pool.group}. Quantise "
            "page by page."
        )
    groups = whole // pool.group
    side = (n, groups, d) if pool.axis == "channel" else (n, page, groups)
    for field in ("scale", "zero"):
        array = getattr(pool, field)
        if array is not None:
            checks.shape(f"{name}.{field}", array, side)
            checks.dtype(f"{name}.{field}", array, ("float16", "int16"))
