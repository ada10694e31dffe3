"""Public function of the op: validation, then dispatch."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.pallas_kernels import checks
from kvjax.pallas_kernels.dispatch import Backend, Op, Tiles
from kvjax.pallas_kernels.partial import Partial
from kvjax.pallas_kernels.sparse_prefill.args import SparseArgs
from kvjax.pallas_kernels.sparse_prefill.layout import Rules
from kvjax.pallas_kernels.sparse_prefill.patterns import (
    BlockList,
    Diagonals,
    Pattern,
    Shared,
    table,
)

OP = Op(
    name="sparse_prefill",
    backends=("reference", "xla", "tpu", "gpu"),
    gives=("B H T D", "B H T"),
)


def sparse_prefill(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    pattern: Pattern,
    *,
    q_start: Int[Array, "B"] | None = None,
    kv_len: Int[Array, "B"] | None = None,
    scale: float,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    causal: bool = True,
    backend: Backend = "auto",
    tiles: Tiles = None,
    interpret: bool = False,
) -> Partial:
    """Softmax attention of queries over the KV blocks that a pattern lists for them.

    Args:
        q: queries after RoPE, `[B, H, T, D]`; `H` is a multiple of `K`.
        k: keys, slot `j` at position `j`, `[B, K, S, D]`.
        v: values, `[B, K, S, D]`.
        pattern: `BlockList`, `Diagonals` or `Shared`; lists per query head, per KV
            head or for all (`Hx` in H, K, 1). Listing a block twice for one query
            block is an error that is not detected: its keys weigh double.
        q_start: position of each row's first query, `[B]` int32; None is 0.
        kv_len: slots of each row that hold keys, `[B]` int32; None is `S`. What
            later slots hold is never used, not even NaN.
        scale: factor on `q . k`.
        window: a query at `p` sees `p - window < j`, besides the sinks; None for all.
        sinks: with a window, the first `sinks` tokens are visible where listed.
        softcap: logits become `softcap * tanh(logits / softcap)`, or None.
        causal: a query at `p` sees `j <= p` only.
        backend: `auto`, or one of the implementations.
        tiles: block sizes of a Pallas backend, instead of the tuned ones.
        interpret: run a Pallas backend in its interpreter.

    Returns:
        `Partial(out [B, H, T, D], lse [B, H, T] f32)`; `out` is f32, from a Pallas
        backend in `q`'s dtype. A query that sees nothing has out 0 and lse -inf.
        Differentiable in `q`, `k` and `v`, through `out` and through `lse`.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit together.
        NotImplementedError: the explicit backend does not serve this call.

    Cost: `4 D block_q block_k` FLOP per listed block and query head; each listed
        block is read once per list (heads of a KV head that share one read it once).

    Source: the sparse prefill of MInference (2407.02490), FlexPrefill (2502.20766)
        and XAttention (2503.16428), with the softmax of FlashAttention (2205.14135).
    """
    _check(q, k, v, pattern)
    _check_rules(window, sinks, softcap)
    batch, tokens, slots = q.shape[0], q.shape[2], k.shape[2]
    for name, value in (("q_start", q_start), ("kv_len", kv_len)):
        if value is not None:
            checks.shape(name, value, (batch,))
            checks.integers(name, value)
    start = jnp.zeros((batch,), jnp.int32) if q_start is None else jnp.asarray(q_start)
    length = jnp.full((batch,), slots, jnp.int32)
    if kv_len is not None:
        length = jnp.minimum(kv_len, slots)
    if causal:  # what no query of the call can see is never loaded
        length = jnp.minimum(length, start + tokens)
    rules = Rules(
        scale=float(scale), window=window, sinks=sinks, softcap=softcap, causal=causal
    )
    args = SparseArgs(
        q=q, k=k, v=v, pattern=pattern, q_start=start, kv_len=length, rules=rules
    )
    return OP(args, backend=backend, tiles=tiles, interpret=interpret)


def _check(q: Array, k: Array, v: Array, pattern: Pattern) -> None:
    for name, array in (("q", q), ("k", k), ("v", v)):
        if len(array.shape) != 4:
            raise ValueError(f"`{name}` must have 4 axes; got {list(array.shape)}.")
        checks.dtype(name, array)
        if array.dtype != q.dtype:
            raise ValueError(
                f"`{name}` must have the dtype of `q`, {q.dtype}; got {array.dtype}. "
                "Convert one of them."
            )
    batch, heads, tokens, dim = q.shape
    kv_heads, slots = k.shape[1:3]
    sizes = {"B": batch, "K": kv_heads, "S": slots, "D": dim}
    checks.shape("k", k, ("B", "K", "S", "D"), **sizes)
    checks.shape("v", v, ("B", "K", "S", "D"), **sizes)
    checks.group(heads, kv_heads)
    if not tokens or not slots:
        raise ValueError(f"`q` and `k` must hold tokens; got T={tokens}, S={slots}.")
    _check_pattern(pattern, batch, heads, kv_heads, tokens)


def _check_pattern(
    pattern: Pattern, batch: int, heads: int, kv_heads: int, tokens: int
) -> None:
    if not isinstance(pattern, BlockList | Diagonals | Shared):
        raise ValueError(
            "`pattern` must be a BlockList, Diagonals or Shared; got "
            f"{type(pattern).__name__}."
        )
    for name in ("block_q", "block_k"):
        size = getattr(pattern, name)
        if size < 1:
            raise ValueError(f"`pattern.{name}` must be positive; got {size}.")
    entries, name = table(pattern), type(pattern).__name__
    blocks = (-(-tokens // pattern.block_q),) if isinstance(pattern, BlockList) else ()
    lists = entries.shape[1] if len(entries.shape) > 1 else 0
    if lists not in (1, kv_heads, heads):
        raise ValueError(
            f"`pattern` must have 1, {kv_heads} (KV heads) or {heads} (query heads) "
            f"lists on axis 1; got {list(entries.shape)}."
        )
    checks.shape(f"{name} entries", entries, (batch, lists, *blocks, "C"))
    checks.shape(f"{name}.counts", pattern.counts, (batch, lists, *blocks))
    checks.integers(f"{name} entries", entries)
    checks.integers(f"{name}.counts", pattern.counts)
    if not entries.size:
        raise ValueError(
            f"`pattern` must have room for an entry; got {list(entries.shape)}. "
            "Use counts of 0 for empty lists."
        )


def _check_rules(window: int | None, sinks: int, softcap: float | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"`window` must be positive or None; got {window}.")
    if sinks < 0:
        raise ValueError(f"`sinks` must not be negative; got {sinks}.")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"`softcap` must be positive or None; got {softcap}.")
