"""`page_score`: validation and dispatch."""

from jaxtyping import Array, Float, Int

from kvjax.pallas_kernels import checks, stacked
from kvjax.pallas_kernels.dispatch import Backend, Op, Tiles
from kvjax.pallas_kernels.page_score.args import PageArgs

OP = Op(name="page_score", backends=("reference", "xla", "tpu", "gpu"))

MODES = ("bound", "dot")
GROUPS = ("max", "sum", "softmax_max", "softmax_sum")


def page_score(
    q: Float[Array, "B H T D"],
    a: Float[Array, "R K P D"],
    b: Float[Array, "R K P D"] | None = None,
    *,
    row: Int[Array, ""] | None = None,
    mode: str,
    group: str,
    scale: float | None = None,
    backend: Backend = "auto",
    tiles: Tiles = None,
    interpret: bool = False,
) -> Float[Array, "B K T P"]:
    """How much each query wants each page, one score per KV head.

    Args:
        q: queries after RoPE, `[B, H, T, D]`; `H` is a multiple of `K`.
        a: minimum of the keys of each page with mode `bound`, or the mean (or a
            centroid) with mode `dot`, `[R, K, P, D]`; must be finite.
        b: maximum of the keys with mode `bound`, `[R, K, P, D]`; None with `dot`.
        row: query row `i` reads row `row + i` of `a` and `b`, which may then hold the
            rows of many layers; an int32 scalar, at most `R - B`. None: 0, and `R` is
            `B`.
        mode: `bound`: `sum_c max(q_c a_c, q_c b_c)`, which no `q . k` of the page
            exceeds; `dot`: `q . a`.
        group: how the heads of a GQA group are combined: the `max` or the `sum` of
            their scores; `softmax_max` and `softmax_sum` first turn each head's
            scores, times `scale`, into shares of all pages.
        scale: factor on the scores inside of the softmax; None without one.
        backend: see `dispatch.Op`.
        tiles: `{"pages": pages per step}`.
        interpret: run a Pallas backend in its interpreter.

    Returns:
        `[B, K, T, P]` f32.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit.
        NotImplementedError: the chosen backend does not serve this case.

    Cost: reads `B` rows of `a` and `b` once; with `row` the XLA path copies them first.

    Source: Quest (2406.10774) equation 1 (`bound`); MoBA (2502.13189), InfLLM
        (2402.04617) and ShadowKV (2410.21465) rank by `dot`; NSA (2502.11089) sums
        shares over a group. Deviation from Quest: the heads of a group share pages.
    """
    args = PageArgs(q=q, a=a, b=b, row=row, mode=mode, group=group, scale=scale)
    _check(args)
    return OP(args, backend=backend, tiles=tiles, interpret=interpret)


def _check(args: PageArgs) -> None:
    q, a, b, row, mode, group = args.q, args.a, args.b, args.row, args.mode, args.group
    for name, value, known in (("mode", mode, MODES), ("group", group, GROUPS)):
        if value not in known:
            raise ValueError(f"`{name}` must be one of {list(known)}; got {value!r}.")
    if q.ndim != 4:
        raise ValueError(f"`q` must be [B, H, T, D]; got {list(q.shape)}.")
    if a.ndim != 4:
        raise ValueError(f"`a` must be [R, K, P, D]; got {list(a.shape)}.")
    checks.dtype("q", q)
    checks.dtype("a", a)
    checks.shape("a", a, ("R", "K", "P", "D"), D=q.shape[3])
    stacked.check_row(row)
    stacked.check("a", a, q.shape[0], row)
    checks.group(q.shape[1], a.shape[1])
    if (b is None) != (mode == "dot"):
        got = "None" if b is None else "an array"
        raise ValueError(
            f"`b` must be an array with mode 'bound' and None with 'dot'; got {got} "
            f"with mode {mode!r}."
        )
    if b is not None:
        checks.shape("b", b, tuple(a.shape))
        checks.dtype("b", b, (a.dtype.name,))
    if (args.scale is None) == group.startswith("softmax"):
        raise ValueError(
            "`scale` must be a number with the softmax groups and None with the "
            f"others; got {args.scale} with group {group!r}."
        )
