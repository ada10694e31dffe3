"""Real sizes of `decode_attention`, for the compilers and the benchmarks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.pallas_kernels.cases import Arguments, Workload
from kvjax.pallas_kernels.quantized import Quantized

BF16 = jnp.bfloat16
Codec = tuple[int, str, int, bool]
"""Bits, axis, group, symmetric."""

LLAMA = (32, 8, 128)  # query heads, KV heads, head dim
CONTEXT = 131072
LAYERS = 8


def stored(lead: tuple[int, ...], slots: int, d: int, codec: Codec | None) -> Any:
    """Shapes of keys or values, scales and zeros as int16 bits."""
    struct: Any = jax.ShapeDtypeStruct
    if codec is None:
        return struct((*lead, slots, d), BF16)
    bits, axis, group, symmetric = codec
    shape = (slots // group, d) if axis == "channel" else (slots, d // group)
    one = struct((*lead, *shape), jnp.int16)
    return Quantized(
        codes=struct((*lead, slots, d * bits // 8), jnp.uint8),
        scale=one,
        zero=None if symmetric else one,
        bits=bits,
        axis=axis,
        group=group,
    )


def sizes(
    batch: int,
    keys: Codec | None,
    values: Codec | None,
    ragged: bool = False,
    layers: int = 1,
) -> Arguments:
    """Shapes of a decode step of Llama-3.1-8B over a full cache, one of `layers`."""
    heads, kv_heads, d = LLAMA
    struct = jax.ShapeDtypeStruct
    stack = batch * layers
    lead, slots = (
        ((stack,), kv_heads * CONTEXT) if ragged else ((stack, kv_heads), CONTEXT)
    )
    args = (
        struct((batch, heads, 1, d), BF16),
        stored(lead, slots, d, keys),
        stored(lead, slots, d, values),
        struct((batch, kv_heads), jnp.int32),
    )
    kwargs: dict[str, Any] = {"scale": d**-0.5}
    if ragged:
        kwargs["offsets"] = struct((batch, kv_heads + 1), jnp.int32)
    if layers > 1:
        kwargs["row"] = struct((), jnp.int32)
    return args, kwargs


def workload(name: str, batch: int, *how: Any) -> Workload:
    """A `Workload` from the arguments of `sizes`."""
    make = functools.partial(sizes, batch, *how)
    args, _ = sizes(batch, *how[:3])  # of a stack, one layer
    moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(args))
    out = 4 * batch * LLAMA[0] * (LLAMA[2] + 1)
    return Workload(name=name, make=make, floor_bytes=moved + out)


CODECS: dict[str, tuple[Codec | None, Codec | None]] = {
    "bf16": (None, None),
    "int8": ((8, "token", 128, True), (8, "token", 128, True)),
    "int4": ((4, "channel", 32, False), (4, "token", 32, False)),
    "int2": ((2, "channel", 32, False), (2, "token", 32, False)),
}
WORKLOADS = (
    *(
        workload(f"{name} 128k batch {batch}", batch, *codec)
        for name, codec in CODECS.items()
        for batch in (1, 16)
    ),
    *(
        workload(f"ragged bf16 128k batch {batch}", batch, None, None, True)
        for batch in (1, 16)
    ),
    *(
        workload(
            f"{name} 128k batch 1 of {LAYERS} layers",
            *(1, *CODECS[name], False, LAYERS),
        )
        for name in ("bf16", "int8", "int4")
    ),
    workload(
        f"ragged bf16 128k batch 1 of {LAYERS} layers", 1, None, None, True, LAYERS
    ),
)
