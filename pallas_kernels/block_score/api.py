"""`block_score`: validation and dispatch."""

from jaxtyping import Array, Float

from kvjax.pallas_kernels import checks
from kvjax.pallas_kernels.block_score.args import BlockArgs
from kvjax.pallas_kernels.dispatch import Backend, Op, Tiles

OP = Op(
    name="block_score",
    backends=("reference", "xla", "tpu", "gpu"),
    gives=("B H Q P",),
)

MODES = ("mean", "antidiagonal")


def block_score(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K S D"],
    *,
    block_q: int,
    block_k: int,
    mode: str = "antidiagonal",
    stride: int = 16,
    scale: float,
    causal: bool = True,
    backend: Backend = "auto",
    tiles: Tiles = None,
    interpret: bool = False,
) -> Float[Array, "B H T_block_q S_block_k"]:
    """Estimated attention mass of every key block for every query block.

    `mean`: softmax over key blocks of the product of mean-pooled queries and keys; a
    row sums to 1. `antidiagonal`: tokens form groups of `stride`; a group of queries
    and one of keys score the mean of the products on the antidiagonal of their tile,
    `sum_j q[g * stride + stride - 1 - j] . k[h * stride + j] / stride`; softmax over
    the key groups, summed over the groups of a block pair, so that a row sums to
    `block_q / stride`.

    Args:
        q: queries after RoPE, `[B, H, T, D]`; the last query and the last key are of
            the same token.
        k: keys, `[B, K, S, D]`, `S >= T` if causal; all live.
        block_q: queries per block; divides `T`.
        block_k: keys per block; divides `S`.
        mode: `mean` or `antidiagonal`.
        stride: tokens per group of `antidiagonal`; divides both blocks.
        scale: factor on `q . k`.
        causal: groups (`mean`: blocks) see those that start no later than they end.
        backend: see `dispatch.Op`.
        tiles: `{"rows": query groups, "columns": key groups}` per step.
        interpret: run a Pallas backend in its interpreter.

    Returns:
        f32 `[B, H, T / block_q, S / block_k]`; 0 for blocks that are not visible.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit.
        NotImplementedError: the chosen backend does not serve this case.

    Cost: `1 / stride` of dense attention's score product (`mean`: `1 / block_q /
        block_k`); the map over groups is never written out.

    Source: XAttention (2503.16428) for `antidiagonal`, its group-level causal mask and
        scale included; MInference (2407.02490) and FlexPrefill (2502.20766) for `mean`.
    """
    args = BlockArgs(
        q=q,
        k=k,
        block_q=block_q,
        block_k=block_k,
        mode=mode,
        stride=stride,
        scale=scale,
        causal=causal,
    )
    _check(args)
    return OP(args, backend=backend, tiles=tiles, interpret=interpret)


def _check(args: BlockArgs) -> None:
    q, k, mode, stride = args.q, args.k, args.mode, args.stride
    checks.shape("q", q, ("B", "H", "T", "D"))
    b, h, t, d = q.shape
    checks.shape("k", k, ("B", "K", "S", "D"), B=b, D=d)
    checks.group(h, k.shape[1])
    checks.dtype("q", q)
    checks.dtype("k", k)
    if q.dtype != k.dtype:
        raise ValueError(
            f"`q` and `k` must have one dtype; got {q.dtype} and {k.dtype}. Convert "
            "one of them."
        )
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {list(MODES)}; got {mode!r}.")
    s = k.shape[2]
    blocks = ("block_q", args.block_q, t), ("block_k", args.block_k, s)
    for name, block, size in blocks:
        if block < 1 or size % block:
            raise ValueError(
                f"`{name}` must divide the {size} tokens; got {block}. Pad in front, "
                "or choose another block."
            )
        if mode == "antidiagonal" and (stride < 1 or block % stride):
            raise ValueError(f"`stride` must divide `{name}`={block}; got {stride}.")
    if args.causal and s < t:
        raise ValueError(
            f"`k` must hold at least as many tokens as `q` if causal; got {s} and {t}."
        )
