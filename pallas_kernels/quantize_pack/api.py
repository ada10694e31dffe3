"""`quantize_pack`: validation and dispatch; `dequantize`, its inverse."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kvjax.pallas_kernels import checks
from kvjax.pallas_kernels.dispatch import Backend, Op, Tiles
from kvjax.pallas_kernels.quantize_pack.args import PackArgs
from kvjax.pallas_kernels.quantize_pack.xla import dequantize as _dequantize
from kvjax.pallas_kernels.quantized import BITS, Quantized

OP = Op(
    name="quantize_pack",
    backends=("reference", "xla", "tpu", "gpu"),
    gives=("*lead X D", "*lead X D", "*lead X D"),
)

AXES = ("channel", "token")


def quantize_pack(
    x: Float[Array, "*lead S D"],
    live: Bool[Array, "*lead S"],
    *,
    bits: int,
    axis: str,
    group: int,
    symmetric: bool = False,
    backend: Backend = "auto",
    tiles: Tiles = None,
    interpret: bool = False,
) -> Quantized:
    """Packed codes of `x` with one float16 scale (and zero) per group, as int16 bits.

    Every live value within reach of float16 scales is off by half a step at most:
    scales and zeros are rounded outwards, constant groups get the scale 1, and what
    float16 cannot reach saturates. Statistics come from live slots alone; dead slots,
    which may hold NaN, get code 0. Codes have no gradient, and none flows.

    With 1 bit the two levels are no extremes, which would be off by more than the mean
    is, but the means of the values below and above the middle of the range; a value
    takes the nearer one.

    Args:
        x: values, `[*lead, S, D]`; f32, bf16 or f16.
        live: which slots count, `[*lead, S]`.
        bits: per code, 1, 2, 4 or 8.
        axis: `channel`: a group is `group` consecutive slots of one channel;
            `token`: it is `group` channels of one slot.
        group: elements that share a scale; divides `S` or `D`.
        symmetric: no zero; codes are signed around `(2**bits - 1) // 2`; not with 1
            bit, which leaves no sign.
        backend: see `dispatch.Op`.
        tiles: `{"block": slots per program}`.
        interpret: run a Pallas backend in its interpreter.

    Returns:
        `Quantized`, see there for the layout of its arrays.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit.
        NotImplementedError: the chosen backend does not serve this case.

    Cost: reads `x` once, writes `bits / 8` bytes per element, and 4 bytes per group
        (symmetric: 2).

    Source: KIVI (2402.02750) section 3; asymmetric min/scale, round to nearest.
    Deviation: the levels of 1 bit, which KIVI does not have.
    """
    args = PackArgs(
        x=x, live=live, bits=bits, axis=axis, group=group, symmetric=symmetric
    )
    _check(args)
    args = dataclasses.replace(args, x=jax.lax.stop_gradient(x))
    return OP(args, backend=backend, tiles=tiles, interpret=interpret)


def dequantize(quantized: Quantized, dtype: Any = jnp.float32) -> Array:
    """The values `[*lead, S, D]` that the codes stand for.

    Args:
        quantized: from `quantize_pack`.
        dtype: of the result; the arithmetic is float32.
    """
    return _dequantize(quantized).astype(dtype)


def _check(args: PackArgs) -> None:
    x, bits, axis, group = args.x, args.bits, args.axis, args.group
    if bits not in BITS:
        raise ValueError(f"`bits` must be one of {list(BITS)}; got {bits}.")
    if axis not in AXES:
        raise ValueError(f"`axis` must be one of {list(AXES)}; got {axis!r}.")
    if x.ndim < 2:
        raise ValueError(f"`x` must be [*lead, S, D]; got {list(x.shape)}.")
    checks.dtype("x", x)
    lead = tuple(x.shape[:-1])
    checks.shape("live", args.live, lead)
    checks.dtype("live", args.live, ("bool",))
    slots, channels = x.shape[-2:]
    if channels % (8 // bits):
        raise ValueError(
            f"{bits}-bit codes pack {8 // bits} channels into a byte; got `x` with "
            f"{channels} channels. Use more bits."
        )
    size, name = (slots, "slots") if axis == "channel" else (channels, "channels")
    if group < 1 or size % group:
        raise ValueError(
            f"`group` must divide the {size} {name} with axis={axis!r}; got {group}. "
            "Pad with dead slots, or choose another group."
        )
    if args.symmetric and bits == 1:
        raise ValueError(
            "1-bit codes have no sign; got symmetric=True. Use symmetric=False, or "
            "more bits."
        )
