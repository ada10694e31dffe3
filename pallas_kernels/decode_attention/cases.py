"""What `decode_attention` is tried on."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.pallas_kernels.cases import Arguments, Case
from kvjax.pallas_kernels.decode_attention.workloads import BF16, Codec
from kvjax.pallas_kernels.decode_attention.workloads import WORKLOADS as WORKLOADS
from kvjax.pallas_kernels.quantize_pack import quantize_pack

SIDES = ("keys", "values")
NAN = np.int16(0x7E00)
"""A float16 that is none, as bits."""


def encode(x: jax.Array, held: jax.Array, codec: Codec | None, dtype: Any) -> Any:
    """A plain array with NaN, or codes with NaN scales, where nothing is held."""
    if codec is None:
        return jnp.where(held[..., None], x, jnp.nan).astype(dtype)
    bits, axis, group, symmetric = codec
    exact = quantize_pack(
        x, held, bits=bits, axis=axis, group=group, symmetric=symmetric
    )
    scale, zero = exact.scale, exact.zero
    dead = ~held[..., None]
    if axis == "channel":
        dead = jnp.all(dead.reshape(*scale.shape[:-1], group, 1), axis=-2)
    scale = jnp.where(dead, NAN, scale)
    zero = None if zero is None else jnp.where(dead, NAN, zero)
    codes = jnp.where(held[..., None], exact.codes, 255)
    return dataclasses.replace(exact, codes=codes, scale=scale, zero=zero)


def within(x: jax.Array, stack: tuple[int, int]) -> jax.Array:
    """Rows among others, which hold what must not be read: NaN, or large numbers."""
    other = NAN if x.dtype == jnp.int16 else 255
    if jnp.issubdtype(x.dtype, jnp.floating):
        other = jnp.nan
    return jnp.pad(x, (stack, *[(0, 0)] * (x.ndim - 1)), constant_values=other)


def build(
    rng: np.random.Generator,
    lengths: list[list[int]],
    *,
    heads: int,
    slots: int,
    d: int,
    t: int = 1,
    dtype: Any = jnp.float32,
    keys: Codec | None = None,
    values: Codec | None = None,
    offsets: list[list[int]] | None = None,
    located: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    stack: tuple[int, int] | None = None,
) -> Arguments:
    """Random arguments; `located` gives every slot a position and frees some.

    `stack` are rows before and behind those that are read: the caller passes `row`.
    """
    held_by = np.asarray(lengths, np.int32)
    b, kwargs = len(held_by), {}
    slot = np.arange(slots)
    held = slot < held_by[..., None]
    if offsets is not None:
        start = np.asarray(offsets, np.int32)
        kwargs["offsets"] = jnp.asarray(start)
        begin = start[:, :-1, None]
        held = np.any((slot >= begin) & (slot < begin + held_by[..., None]), axis=1)
    if located:
        place = rng.permuted(np.broadcast_to(slot, held.shape), axis=-1)
        place = np.where(held & (rng.random(held.shape) < 0.8), place, -1)
        now = slots // 2 + np.arange(t)[None] * (slots // (2 * t) or 1)
        kwargs["positions"] = jnp.asarray(place, jnp.int32)
        kwargs["q_positions"] = jnp.asarray(np.repeat(now, b, 0), jnp.int32)
        # What the last query does not see, nobody sees.
        held = (place >= 0) & (place <= now.max())
    wide = (*held.shape, d)
    k, v = (jnp.asarray(rng.standard_normal(wide), jnp.float32) for _ in range(2))
    q = jnp.asarray(rng.standard_normal((b, heads, t, d)), dtype)
    held = jnp.asarray(held)
    k, v = encode(k, held, keys, dtype), encode(v, held, values, dtype)
    if stack is not None:
        kwargs["row"] = jnp.asarray(stack[0], jnp.int32)
        among = functools.partial(within, stack=stack)
        k, v = jax.tree.map(among, (k, v))
        if located:
            kwargs["positions"] = among(kwargs["positions"])
    args = (q, k, v, jnp.asarray(held_by))
    return args, {**kwargs, "scale": d**-0.5, "window": window, "softcap": softcap}


def case(name: str, lengths: list[list[int]], *, tile: int = 128, **how: Any) -> Case:
    """A `Case` from the arguments of `build`."""
    slow = how.pop("slow", False)
    refused = () if on_gpu(**how) else ("gpu",)
    if any(codec is not None and codec[0] == 1 for codec in map(how.get, SIDES)):
        refused = ("tpu", "gpu")
    make = functools.partial(build, lengths=lengths, **how)
    return Case(name=name, make=make, tiles={"block": tile}, refused=refused, slow=slow)


def on_gpu(
    *,
    slots: int,
    d: int,
    dtype: Any = jnp.float32,
    keys: Codec | None = None,
    values: Codec | None = None,
    located: bool = False,
    **how: Any,
) -> bool:
    """Whether the GPU kernels serve a case; their products are of 16-bit numbers."""
    if dtype != BF16 or slots % 8:
        return False
    if keys is None and values is None and not located:
        return True
    along_slots = values is not None and values[1] == "channel"
    return d in (64, 128) and not along_slots


INT4: dict[str, Any] = {
    "keys": (4, "channel", 32, False),
    "values": (4, "token", 32, False),
}
CASES = (
    case("f32", [[300, 130]], heads=2, slots=300, d=128),
    case(
        "bf16 zero and one", [[0, 1], [257, 128]], heads=8, slots=304, d=64, dtype=BF16
    ),
    case("gqa8 d256", [[200]], heads=8, slots=200, d=256, dtype=BF16),
    case("d32 t4 gqa8", [[77, 200]], heads=16, slots=200, d=32, t=4),
    case("d80 softcap", [[150, 0]], heads=2, slots=150, d=80, softcap=5.0),
    case("d96 nothing held", [[0, 0]], heads=2, slots=130, d=96),
    case("one slot", [[1]], heads=4, slots=1, d=64, dtype=BF16),
    case("bf16 d256", [[70]], heads=1, slots=72, d=256, dtype=BF16, slow=True),
    case("positions", [[300, 140]], heads=8, slots=300, d=128, t=4, located=True),
    case(
        "int8 token gqa4",
        [[300, 64]],
        heads=8,
        slots=304,
        d=128,
        keys=(8, "token", 128, True),
        values=(8, "token", 32, False),
        dtype=BF16,
    ),
    case(
        "int4 kivi gqa4",
        [[256, 70]],
        heads=8,
        slots=256,
        d=128,
        **INT4,
    ),
    case(
        "int2 kivi bf16 t2",
        [[192]],
        heads=2,
        slots=192,
        d=64,
        t=2,
        keys=(2, "channel", 64, False),
        values=(2, "token", 32, False),
        dtype=BF16,
        tile=64,
    ),
    case(
        "int2 keys int1 values",
        [[192, 50]],
        heads=4,
        slots=192,
        d=64,
        keys=(2, "channel", 32, False),
        values=(1, "token", 32, False),
        dtype=BF16,
    ),
    case(
        "ragged int1 keys",
        [[100, 60]],
        heads=4,
        slots=192,
        d=64,
        offsets=[[0, 100, 192]],
        keys=(1, "token", 16, False),
        values=(1, "channel", 32, False),
    ),
    case(
        "int8 channel both d128",
        [[256]],
        slow=True,
        heads=2,
        slots=256,
        d=128,
        keys=(8, "channel", 128, True),
        values=(8, "channel", 32, False),
    ),
    case(
        "int4 token keys int2 channel values",
        [[128, 100]],
        slow=True,
        heads=2,
        slots=128,
        d=96,
        keys=(4, "token", 32, False),
        values=(2, "channel", 16, False),
        located=True,
    ),
    case(
        "mixed plain keys int4 values d256",
        [[130, 3]],
        slow=True,
        heads=4,
        slots=160,
        d=256,
        values=(4, "channel", 32, True),
        dtype=BF16,
    ),
    case(
        "mixed int8 keys plain values d80",
        [[140]],
        heads=2,
        slots=160,
        d=80,
        keys=(8, "channel", 32, False),
    ),
    case(
        "ragged",
        [[100, 0, 200]],
        heads=6,
        slots=345,
        d=64,
        offsets=[[3, 110, 111, 345]],
    ),
    case(
        "ragged bf16 d128",
        [[70, 1, 130]],
        heads=6,
        slots=264,
        d=128,
        offsets=[[5, 80, 83, 264]],
        dtype=BF16,
    ),
    case("bf16 d80", [[90]], heads=2, slots=104, d=80, dtype=BF16, slow=True),
    case("bf16 d32 t4", [[90]], heads=2, slots=96, d=32, t=4, dtype=BF16, slow=True),
    case("bf16 d96", [[64]], heads=1, slots=64, d=96, dtype=BF16, slow=True),
    case(
        "ragged int4",
        [[100, 60], [1, 250]],
        slow=True,
        heads=8,
        slots=320,
        d=128,
        offsets=[[0, 101, 161], [7, 40, 320]],
        **INT4,
        dtype=BF16,
    ),
    case(
        "ragged positions",
        [[128, 90]],
        heads=2,
        slots=256,
        d=32,
        offsets=[[0, 130, 256]],
        located=True,
        window=100,
    ),
    case(
        "int4 kivi bf16 gqa4",
        [[256, 70]],
        heads=8,
        slots=256,
        d=64,
        dtype=BF16,
        **INT4,
    ),
    case(
        "int2 symmetric, int8 values, softcap",
        [[130, 0]],
        heads=4,
        slots=160,
        d=64,
        t=5,
        keys=(2, "token", 16, True),
        values=(8, "token", 64, True),
        softcap=10.0,
        dtype=BF16,
    ),
    case(
        "ragged int4 keys per token, plain values, positions",
        [[100, 60]],
        heads=4,
        slots=192,
        d=64,
        offsets=[[5, 110, 192]],
        keys=(4, "token", 32, False),
        located=True,
        dtype=BF16,
    ),
    case("row", [[150, 9]], heads=4, slots=150, d=64, stack=(2, 1)),
    case(
        "row bf16 two rows",
        [[0, 130], [72, 1]],
        heads=4,
        slots=136,
        d=64,
        stack=(1, 2),
        dtype=BF16,
    ),
    case(
        "row int4 positions",
        [[160, 70]],
        heads=4,
        slots=160,
        d=64,
        located=True,
        stack=(1, 1),
        dtype=BF16,
        **INT4,
    ),
    case(
        "row ragged",
        [[100, 0], [31, 200]],
        heads=4,
        slots=312,
        d=64,
        offsets=[[3, 110, 312], [40, 80, 312]],
        stack=(1, 0),
        dtype=BF16,
    ),
    case(
        "row ragged int8 positions",
        [[100, 60]],
        slow=True,
        heads=4,
        slots=192,
        d=64,
        offsets=[[5, 110, 192]],
        keys=(8, "token", 64, True),
        values=(8, "token", 64, True),
        located=True,
        stack=(1, 2),
        dtype=BF16,
    ),
    case(
        "ragged far into a pool",
        [[140, 0, 20]],
        heads=6,
        slots=1280,
        d=64,
        offsets=[[611, 760, 761, 790]],
        dtype=BF16,
    ),
    case(
        "ragged int4 far into a pool",
        [[90, 30]],
        heads=4,
        slots=1280,
        d=64,
        offsets=[[1030, 1125, 1160]],
        dtype=BF16,
        **INT4,
    ),
    case(
        "window bf16",
        [[256, 90]],
        heads=2,
        slots=256,
        d=64,
        located=True,
        window=40,
        dtype=BF16,
    ),
)
