"""What `block_score` is tried on."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.pallas_kernels.cases import Case, Workload


def make(
    rng: np.random.Generator,
    *,
    b: int = 1,
    h: int = 2,
    k: int = 1,
    t: int,
    s: int,
    d: int = 64,
    dtype: Any = jnp.float32,
    block: tuple[int, int] = (32, 32),
    **options: Any,
):
    """Normal queries and keys, keys of some blocks stronger than those of others."""
    q = rng.standard_normal((b, h, t, d))
    keys = rng.standard_normal((b, k, s, d)) + np.sin(np.arange(s) / 20)[:, None]
    kwargs = {"block_q": block[0], "block_k": block[1], "scale": d**-0.5}
    arrays = (jnp.asarray(q, dtype), jnp.asarray(keys, dtype))
    return arrays, kwargs | options


def case(name: str, gradient=(), refused=(), slow=False, tiles=None, **how) -> Case:
    """A case whose arguments are `make(rng, **how)`."""
    if how.get("dtype", jnp.float32) == jnp.float32:
        refused = (*refused, "gpu")  # what tensor cores do not multiply
    return Case(
        name=name,
        make=functools.partial(make, **how),
        tiles=tiles or {"rows": 8, "columns": 128},
        gradient=gradient,
        refused=tuple(refused),
        slow=slow,
    )


HALF: dict[str, Any] = {"dtype": jnp.bfloat16}

CASES = (
    case("antidiagonal", t=128, s=128, stride=8, gradient=(0, 1)),
    case("stride16", t=128, s=256, stride=16, h=4, d=128),
    case("mean", t=128, s=128, mode="mean", gradient=(0, 1)),
    case("mean_uneven", t=128, s=256, mode="mean", block=(16, 64), h=4, k=2),
    case("grouped8", t=64, s=64, stride=8, h=8, d=32),
    case("batch", b=2, t=64, s=128, stride=8, h=2, k=2, d=80),
    case("uneven_blocks", t=128, s=128, stride=8, block=(64, 16), d=96),
    case("not_causal", t=64, s=32, stride=8, causal=False),
    case("chunk_of_a_prompt", t=64, s=320, stride=8, block=(32, 64)),
    case("bfloat16", t=128, s=128, stride=16, d=128, dtype=jnp.bfloat16),
    case("regrouped", t=512, s=1280, stride=16, h=4, d=128, dtype=jnp.bfloat16),
    case("wide_heads", t=64, s=64, stride=8, d=256, dtype=jnp.bfloat16),
    case("one_block", t=32, s=32, stride=16),
    # Dtypes that tensor cores multiply.
    case("bfloat16_mean", t=128, s=256, mode="mean", block=(16, 64), h=4, k=2, **HALF),
    case("bfloat16_uneven", t=64, s=192, stride=4, block=(32, 64), d=80, **HALF),
    case("bfloat16_chunk", t=64, s=320, stride=8, block=(32, 64), **HALF),
    case("bfloat16_all", t=64, s=32, stride=8, causal=False, gradient=(0, 1), **HALF),
    case("bfloat16_ten", t=160, s=160, stride=4, block=(16, 16), d=96, **HALF),
    case(
        "bfloat16_tiles",
        t=640,
        s=640,
        d=32,
        stride=4,
        block=(8, 8),
        tiles={"rows": 128, "columns": 256},
        **HALF,
    ),
    # Several tiles of key groups, the last one ragged, and several of query groups.
    case("mean_tiles", t=128, s=2400, d=32, mode="mean", block=(8, 8)),
    case("antidiagonal_tiles", t=128, s=2400, d=32, stride=4, block=(8, 8)),
    case("whole_prompt_tiles", t=2400, s=2400, d=32, stride=4, block=(8, 8), slow=True),
)


def workload(name: str, tokens: int, block: int = 128, **options: Any) -> Workload:
    """Llama-3.1-8B heads in bfloat16, one prompt."""
    h, k, d = 32, 8, 128

    def arguments():
        struct = jax.ShapeDtypeStruct
        arrays = (
            struct((1, h, tokens, d), jnp.bfloat16),
            struct((1, k, tokens, d), jnp.bfloat16),
        )
        sizes = {"block_q": block, "block_k": block, "scale": d**-0.5}
        return arrays, sizes | options

    floor = (h + k) * tokens * d * 2 + h * (tokens // block) ** 2 * 4
    return Workload(name=name, make=arguments, floor_bytes=floor)


LONG = 128 * 1024
WORKLOADS = (
    workload("antidiagonal16_128k", LONG, stride=16),
    workload("antidiagonal8_32k", LONG // 4, stride=8),
    workload("mean_128k", LONG, mode="mean"),
)
