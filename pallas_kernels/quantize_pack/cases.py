"""What `quantize_pack` is tried on."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.pallas_kernels.cases import Case, Workload

HARD = ("tpu", "gpu")


def make(
    rng: np.random.Generator,
    *,
    shape: tuple[int, ...],
    bits: int,
    axis: str,
    group: int,
    symmetric: bool = False,
    dtype: Any = jnp.float32,
    dead: str = "some",
    size: float = 1.0,
):
    """Values with a NaN in every dead slot, and constant and empty groups."""
    x = rng.standard_normal(shape) * size * rng.exponential(size=shape[-1])
    live = np.ones(shape[:-1], bool)
    if dead == "some":
        live[..., -3:] = False
        live[..., ::5] = False
        live[0, ..., : min(32, shape[-2] // 2)] = False
    elif dead == "all":
        live[...] = False
    x[..., shape[-2] // 2, :] = 0.25  # a constant slot
    x[..., :, 1] = -3.0  # and a constant channel
    x = np.where(live[..., None], x, np.nan)
    kwargs = {"bits": bits, "axis": axis, "group": group, "symmetric": symmetric}
    return (jnp.asarray(x, dtype), jnp.asarray(live)), kwargs


def case(name: str, tiles=None, refused=(), slow=False, **how) -> Case:
    """A case whose arguments are `make(rng, **how)`."""
    return Case(
        name=name,
        make=functools.partial(make, **how),
        tiles=tiles or {"block": 64},
        refused=tuple(refused),
        slow=slow,
    )


CASES = (
    case("int4_channel", shape=(2, 2, 128, 64), bits=4, axis="channel", group=32),
    case("int4_token", shape=(2, 2, 128, 64), bits=4, axis="token", group=32),
    case("int2_channel", shape=(2, 96, 128), bits=2, axis="channel", group=32),
    case("int2_token", shape=(2, 96, 128), bits=2, axis="token", group=64),
    case(
        "int1_channel",
        shape=(2, 96, 64),
        bits=1,
        axis="channel",
        group=32,
        refused=HARD,
    ),
    case(
        "int1_token", shape=(2, 96, 128), bits=1, axis="token", group=64, refused=HARD
    ),
    case(
        "int1_saturated",
        shape=(1, 64, 128),
        bits=1,
        axis="token",
        group=32,
        size=1e6,
        refused=HARD,
    ),
    case("int8_channel", shape=(1, 64, 128), bits=8, axis="channel", group=64),
    case(
        "int8_whole_token",
        shape=(1, 2, 64, 128),
        bits=8,
        axis="token",
        group=128,
        symmetric=True,
        dtype=jnp.bfloat16,
    ),
    case(
        "symmetric_channel",
        shape=(1, 2, 64, 64),
        bits=4,
        axis="channel",
        group=16,
        symmetric=True,
    ),
    case(
        "bfloat16",
        shape=(1, 2, 128, 128),
        bits=4,
        axis="channel",
        group=32,
        dtype=jnp.bfloat16,
    ),
    case(
        "wide_heads",
        shape=(1, 64, 256),
        bits=4,
        axis="token",
        group=64,
        dtype=jnp.bfloat16,
    ),
    case("ragged_block", shape=(1, 2, 160, 96), bits=4, axis="channel", group=32),
    case(
        "heads_of_80",
        shape=(1, 64, 80),
        bits=4,
        axis="token",
        group=80,
        refused=("gpu",),  # 40 bytes per slot
    ),
    case("short", shape=(2, 8, 32), bits=4, axis="channel", group=8),
    case("one_slot", shape=(2, 1, 32), bits=4, axis="token", group=32),
    case(
        "odd_groups",
        shape=(1, 30, 32),
        bits=4,
        axis="channel",
        group=6,
        refused=HARD,
    ),
    case("none_live", shape=(1, 64, 64), bits=4, axis="channel", group=32, dead="all"),
    case("groups_of_8", shape=(1, 77, 64), bits=4, axis="token", group=8),
    case("few_bytes", shape=(1, 192, 64), bits=2, axis="channel", group=64),
    case("saturated", shape=(1, 64, 64), bits=4, axis="channel", group=32, size=1e6),
    case("subnormal", shape=(1, 64, 64), bits=4, axis="token", group=32, size=1e-7),
    case(
        "float16",
        shape=(1, 64, 64),
        bits=4,
        axis="channel",
        group=32,
        dtype=jnp.float16,
        refused=("tpu",),
    ),
)


def workload(
    name: str, batch: int, slots: int, bits: int, axis: str, group: int = 32
) -> Workload:
    """Keys or values of Llama-3.1-8B in bfloat16."""
    shape = (batch, 8, slots, 128)
    count = int(np.prod(shape))

    def arguments():
        x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        live = jax.ShapeDtypeStruct(shape[:-1], jnp.bool_)
        return (x, live), {"bits": bits, "axis": axis, "group": group}

    side = count // group * 4
    floor = count * 2 + count // 128 + count * bits // 8 + side
    return Workload(name=name, make=arguments, floor_bytes=floor)


LONG = 128 * 1024
WORKLOADS = (
    workload("block128_int4_channel_b16", 16, 128, 4, "channel"),
    workload("block128_int4_token_b16", 16, 128, 4, "token"),
    workload("prompt128k_int4_channel_b1", 1, LONG, 4, "channel"),
    workload("prompt128k_int4_token_b1", 1, LONG, 4, "token"),
    workload("prompt128k_int2_channel_b1", 1, LONG, 2, "channel"),
    workload("prompt128k_int2_token_b1", 1, LONG, 2, "token"),
    workload("prompt128k_int8_token_b16", 16, LONG, 8, "token", 128),
)
