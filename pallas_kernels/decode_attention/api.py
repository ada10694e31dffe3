"""`decode_attention`: what it takes, what it refuses, who serves it."""

import functools

from jaxtyping import Array, Float, Int

from kvjax.pallas_kernels import checks, stacked
from kvjax.pallas_kernels.decode_attention.args import DecodeArgs
from kvjax.pallas_kernels.dispatch import Backend, Op, Tiles
from kvjax.pallas_kernels.gradients import through
from kvjax.pallas_kernels.partial import Partial
from kvjax.pallas_kernels.quantized import BITS, Quantized

OP = Op(name="decode_attention", backends=("reference", "xla", "tpu", "gpu"))

MOST_QUERIES = 16


def decode_attention(
    q: Float[Array, "B H T D"],
    keys: Array | Quantized,
    values: Array | Quantized,
    lengths: Int[Array, "B K"],
    *,
    offsets: Int[Array, "B K+1"] | None = None,
    positions: Array | None = None,
    q_positions: Int[Array, "B T"] | None = None,
    row: Int[Array, ""] | None = None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    backend: Backend = "auto",
    tiles: Tiles = None,
    interpret: bool = False,
) -> Partial:
    """Attention of up to 16 queries per row over the slots each KV head holds.

    Two layouts. Slots: `keys` and `values` are `[B, K, S, D]`, and head `k` of row `b`
    holds the first `lengths[b, k]` slots. Ragged (with `offsets`): they are
    `[B, N, D]`, and the head holds `lengths[b, k]` slots from `offsets[b, k]` on, any
    integer. Blocks that a head does not hold are neither read nor computed. What lies
    in slots that no query sees, NaN included, does not matter.

    With `row` the caches of many layers may lie in one stack, which is read in place:
    `keys`, `values` and `positions` then have `R >= B` rows, `[R, K, S, D]` or
    `[R, N, D]`, of which query row `b` reads row `row + b`.

    Keys and values are plain arrays or `Quantized`, independently of each other; a
    dequantised copy never reaches the main memory. Scales and zeros are the int16 bits
    of float16 numbers; floats are taken too, but on a TPU float16 costs a copy.

    Args:
        q: queries after RoPE, `[B, H, T, D]`, `T <= 16`; `H` a multiple of `K`.
        keys: `[B, K, S, D]` or `[B, N, D]`, an array or `Quantized` of that shape.
        values: likewise; may be stored in another way than the keys.
        lengths: slots held, `[B, K]` int32; in the ragged layout at most
            `offsets[b, k + 1] - offsets[b, k]`.
        offsets: first slot of each head, `[B, K + 1]` int32: the ragged layout.
        positions: `[B, K, S]` or `[B, N]` int32, -1 in free slots. A query at `p` sees
            the slots at `0 <= position <= p`. None: every held slot is seen.
        q_positions: `[B, T]` int32, with `positions`; -1 sees nothing.
        row: first row that is read of `keys`, `values` and `positions`, an int32
            scalar, at most `R - B`. None: 0, and `R` is `B`.
        scale: factor on `q . k`.
        window: with `positions`, only slots with `p - position < window` are seen.
        softcap: logit soft cap, or None.
        backend: see `dispatch.Op`.
        tiles: `block`, slots per step, for the Pallas backends.
        interpret: run the Pallas backends in their interpreters.

    Returns:
        `Partial(out [B, H, T, D], lse [B, H, T])` in float32; 0 and -inf for queries
        that see nothing. Differentiable in `q` and in plain `keys` and `values`: the
        gradient is the reference's, which is computed again for it.

    Raises:
        ValueError: a shape, dtype or combination of arguments is wrong.
        NotImplementedError: the explicit backend does not serve the call.

    Cost: reads codes, scales and zeros of the held slots once, for all query heads of
    a KV head together; memory-bound. Neither `R` nor, in the ragged layout, `N` counts.
    """
    args = DecodeArgs(
        q=q,
        keys=keys,
        values=values,
        lengths=lengths,
        offsets=offsets,
        positions=positions,
        q_positions=q_positions,
        row=row,
        scale=float(scale),
        window=window,
        softcap=softcap,
    )
    _check(args)
    _check_positions(args)
    if softcap is not None and softcap <= 0:
        raise ValueError(f"`softcap` must be positive or None; got {softcap}.")

    def run(args, **how):  # a name for traces, which `OP` has not
        return OP(args, **how)

    return through(
        functools.partial(run, backend=backend, tiles=tiles, interpret=interpret),
        functools.partial(run, backend="reference"),
        args,
    )


def _check(args: DecodeArgs) -> None:
    """Shapes and dtypes of everything but positions."""
    q, lengths, offsets, row = args.q, args.lengths, args.offsets, args.row
    checks.shape("q", q, ("B", "H", "T", "D"))
    checks.dtype("q", q)
    b, h, t, d = q.shape
    if not 1 <= t <= MOST_QUERIES:
        raise ValueError(
            f"`q` must have 1 to {MOST_QUERIES} queries per row; got T={t}. Use a "
            "prefill op for more."
        )
    checks.shape("lengths", lengths, ("B", "K"), B=b)
    checks.integers("lengths", lengths)
    kv_heads = lengths.shape[1]
    checks.group(h, kv_heads)
    stacked.check_row(row)
    axes = ("R", "K", "S", "D")
    if offsets is not None:
        axes = ("R", "N", "D")
        checks.shape("offsets", offsets, ("B", "K + 1"), B=b, **{"K + 1": kv_heads + 1})
        checks.integers("offsets", offsets)
    sizes = {"K": kv_heads, "D": d}
    for name, side in (("keys", args.keys), ("values", args.values)):
        if isinstance(side, Quantized):
            _check_codes(name, side)
        else:
            checks.dtype(name, side)
        checks.shape(name, side, axes, **sizes)
        stacked.check(name, side, b, row)
        # The values follow the keys.
        sizes = {**sizes, "R": side.shape[0], axes[-2]: side.shape[-2]}


def _check_codes(name: str, side: Quantized) -> None:
    """Codes, scales and zeros that belong together."""
    if side.bits not in BITS:
        raise ValueError(f"`{name}.bits` must be 1, 2, 4 or 8; got {side.bits}.")
    if side.axis not in ("channel", "token"):
        raise ValueError(
            f"`{name}.axis` must be 'channel' or 'token'; got {side.axis!r}."
        )
    checks.dtype(f"{name}.codes", side.codes, ("uint8",))
    *lead, slots, d = side.shape
    along = slots if side.axis == "channel" else d
    if side.group < 1 or along % side.group:
        what = "slots" if side.axis == "channel" else "channels"
        raise ValueError(
            f"`{name}.group` must divide the {along} {what}; got {side.group}."
        )
    rows, columns = (
        (slots // side.group, d) if side.axis == "channel" else (slots, d // side.group)
    )
    for part, array in (("scale", side.scale), ("zero", side.zero)):
        if array is not None:
            checks.shape(f"{name}.{part}", array, (*lead, rows, columns))
            checks.dtype(f"{name}.{part}", array, (*checks.FLOATS, "int16"))


def _check_positions(args: DecodeArgs) -> None:
    """Positions of slots and queries come together; a window needs them."""
    positions, q_positions, window = args.positions, args.q_positions, args.window
    if (positions is None) != (q_positions is None):
        missing = "positions" if positions is None else "q_positions"
        raise ValueError(
            f"`positions` and `q_positions` go together; got no `{missing}`. Pass "
            "both, or neither if every query sees every held slot."
        )
    if positions is None:
        if window is not None:
            raise ValueError(
                f"`window` needs `positions` and `q_positions`; got window={window} "
                "without them."
            )
        return
    if window is not None and window < 1:
        raise ValueError(f"`window` must be at least 1 or None; got {window}.")
    axes = ("R", "K", "S") if args.offsets is None else ("R", "N")
    sizes = dict(zip(axes, args.keys.shape[:-1], strict=True))
    checks.shape("positions", positions, axes, **sizes)
    checks.integers("positions", positions)
    b, _, t, _ = args.q.shape
    checks.shape("q_positions", q_positions, ("B", "T"), B=b, T=t)
    checks.integers("q_positions", q_positions)
