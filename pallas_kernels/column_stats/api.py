"""`column_stats`: validation and dispatch."""

from jaxtyping import Array, Float, Int

from kvjax.pallas_kernels import checks
from kvjax.pallas_kernels.column_stats.args import ColumnArgs
from kvjax.pallas_kernels.column_stats.stats import ColumnStats as ColumnStats
from kvjax.pallas_kernels.dispatch import Backend, Op, Tiles

OP = Op(
    name="column_stats",
    backends=("reference", "xla", "tpu", "gpu"),
    gives=("B H X", "B H X", "B H X"),
)


def column_stats(
    q: Float[Array, "B H T D"],
    keys: Float[Array, "B K S D"],
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    weights: Float[Array, "B H T"] | None = None,
    lse: Float[Array, "B H T"] | None = None,
    slash: bool = False,
    backend: Backend = "auto",
    tiles: Tiles = None,
    interpret: bool = False,
) -> ColumnStats:
    """Sum and maximum of each key's softmax weight over the given queries.

    Every query has a softmax over the keys that it sees: `0 <= k_position <=
    q_position`, and inside the window. Each query's row is multiplied by its weight.

    Args:
        q: the queries that vote, after RoPE, `[B, H, T, D]`; f32 or bf16.
        keys: `[B, K, S, D]`; what keys at -1 hold, NaN too, does not matter.
        q_positions: `[B, T]`; queries at -1 do not vote.
        k_positions: `[B, S]`; keys at -1 receive nothing.
        scale: factor on `q . k`.
        window: sliding window in tokens, or None.
        softcap: logit soft cap, or None.
        weights: of each query's row, `[B, H, T]` f32, not negative; None is 1.
        lse: log-sum-exp of each query's logits over the keys that it sees, `[B, H, T]`
            f32, if an attention has it already; -inf: the query does not vote.
        slash: also sum along diagonals.
        backend: see `dispatch.Op`.
        tiles: `{"block_q": queries, "block_k": keys}` per step.
        interpret: run a Pallas backend in its interpreter.

    Returns:
        `ColumnStats`, f32 `[B, H, S]` each.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit.
        NotImplementedError: the chosen backend does not serve this case.

    Cost: `O(T S)` work, half with `lse`; temporaries linear in `S`. A TPU reads queries
        and keys once, as far as the keys of a head fit its VMEM (128k of 128 channels
        in bfloat16); those behind are read twice per block of queries.

    Source: SnapKV (2404.14469), H2O (2306.14048); MInference (2407.02490) for `slash`.
    """
    args = ColumnArgs(
        q=q,
        keys=keys,
        q_positions=q_positions,
        k_positions=k_positions,
        weights=weights,
        lse=lse,
        scale=scale,
        window=window,
        softcap=softcap,
        slash=slash,
    )
    _check(args)
    return OP(args, backend=backend, tiles=tiles, interpret=interpret)


def _check(args: ColumnArgs) -> None:
    q, keys, window, softcap = args.q, args.keys, args.window, args.softcap
    checks.shape("q", q, ("B", "H", "T", "D"))
    b, h, t, d = q.shape
    checks.shape("keys", keys, ("B", "K", "S", "D"), B=b, D=d)
    checks.group(h, keys.shape[1])
    checks.dtype("q", q)
    checks.dtype("keys", keys)
    if q.dtype != keys.dtype:
        raise ValueError(
            f"`q` and `keys` must have one dtype; got {q.dtype} and {keys.dtype}. "
            "Convert one of them."
        )
    checks.shape("q_positions", args.q_positions, ("B", "T"), B=b, T=t)
    checks.shape("k_positions", args.k_positions, ("B", "S"), B=b, S=keys.shape[2])
    checks.integers("q_positions", args.q_positions)
    checks.integers("k_positions", args.k_positions)
    if window is not None and window < 1:
        raise ValueError(f"`window` must be at least 1, or None; got {window}.")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"`softcap` must be positive, or None; got {softcap}.")
    for name, array in (("weights", args.weights), ("lse", args.lse)):
        if array is not None:
            checks.shape(name, array, ("B", "H", "T"), B=b, H=h, T=t)
            checks.dtype(name, array, ("float32",))
