"""What `page_summary` is tried on."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.pallas_kernels.cases import Case, Workload


def make(
    rng: np.random.Generator,
    *,
    slots: int = 160,
    d: int = 64,
    page: int = 16,
    dead: str = "some",
    dtype: Any = jnp.float32,
):
    """Keys with NaN in dead slots, full pages, part-filled ones and an empty one."""
    keys = rng.standard_normal((2, 2, slots, d))
    live = np.ones(keys.shape[:3], bool)
    if dead == "some":
        live &= rng.random(live.shape) < 0.8
        live[:, :, :page] = True
        live[1, :, -page - 3 :] = False
    elif dead == "all":
        live[...] = False
    keys = np.where(live[..., None], keys, np.nan)
    return (jnp.asarray(keys, dtype), jnp.asarray(live)), {"page": page}


def case(name: str, block: int = 128, **how: Any) -> Case:
    """A case whose arguments are `make(rng, **how)`."""
    narrow = how.get("d", 64) % 128 != 0
    return Case(
        name=name,
        make=functools.partial(make, **how),
        tiles={"slots": block},
        refused=("gpu",) if narrow else (),
    )


CASES = (
    case("f32"),
    case("bf16", dtype=jnp.bfloat16),
    case("d128", d=128, slots=80, block=64),
    case("page32_d128", page=32, d=128, slots=320, block=256, dtype=jnp.bfloat16),
    case("page64_d32", page=64, d=32, slots=192, block=512),
    case("page128_d256", page=128, d=256, slots=256, block=1024),
    case("d80", d=80),
    case("d96_bf16", d=96, dtype=jnp.bfloat16),
    case("one_page", slots=16, d=128),
    case("all_live", dead="none"),
    case("none_live", dead="all", d=128, slots=48, dtype=jnp.bfloat16),
)


def workload(name: str, batch: int, slots: int, page: int) -> Workload:
    """Keys of Llama-3.1-8B in bfloat16."""
    shape = (batch, 8, slots, 128)
    count = int(np.prod(shape))

    def arguments():
        keys = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        live = jax.ShapeDtypeStruct(shape[:3], jnp.bool_)
        return (keys, live), {"page": page}

    floor = count * 2 + count // 128 + 3 * count * 2 // page
    return Workload(name=name, make=arguments, floor_bytes=floor)


WORKLOADS = (
    workload("prompt128k_page16_b1", 1, 128 * 1024, 16),
    workload("prompt128k_page16_b16", 16, 128 * 1024, 16),
    workload("prompt128k_page64_b1", 1, 128 * 1024, 64),
    workload("block128_page16_b16", 16, 128, 16),
)
