"""What `page_score` is tried on."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.pallas_kernels.cases import Case, Workload


def make(
    rng: np.random.Generator,
    *,
    heads: tuple[int, int] = (4, 2),
    tokens: int = 1,
    d: int = 64,
    pages: int = 40,
    mode: str = "bound",
    group: str = "max",
    dtype: Any = jnp.float32,
    stack: tuple[int, int] | None = None,
):
    """Queries, and bounds or means of pages; `stack` rows before and behind them."""
    h, k = heads
    q = rng.standard_normal((2, h, tokens, d))
    a = rng.standard_normal((2, k, pages, d))
    b = a + rng.exponential(size=a.shape)
    kwargs: dict[str, Any] = {"mode": mode, "group": group}
    if group.startswith("softmax"):
        kwargs["scale"] = d**-0.5
    arrays = (q, a, b) if mode == "bound" else (q, a)
    q, *bounds = (jnp.asarray(x, dtype) for x in arrays)
    if stack is not None:
        kwargs["row"] = jnp.asarray(stack[0], jnp.int32)
        pad = (stack, *[(0, 0)] * 3)
        bounds = [jnp.pad(x, pad, constant_values=jnp.nan) for x in bounds]
    return (q, *bounds), kwargs


def case(name: str, block: int = 128, **how: Any) -> Case:
    """A case whose arguments are `make(rng, **how)`."""
    plain = how.get("dtype", jnp.float32) == jnp.float32
    return Case(
        name=name,
        make=functools.partial(make, **how),
        tiles={"pages": block},
        refused=("gpu",) if plain else (),  # its products are of 16-bit numbers
    )


BF16 = jnp.bfloat16
CASES = (
    case("bound_max"),
    case("bound_max_bf16", dtype=BF16),
    case("bound_sum_bf16", group="sum", dtype=BF16),
    case("bound_shares", group="softmax_max", pages=300),
    case("dot_max", mode="dot", pages=300),
    case("dot_sum", mode="dot", group="sum", dtype=BF16),
    case("dot_shares", mode="dot", group="softmax_sum", pages=300),
    case("dot_shares_bf16", mode="dot", group="softmax_max", pages=130, dtype=BF16),
    case("many_pages_bf16", pages=1000, dtype=BF16),
    case("several_queries", tokens=3, pages=130),
    case("several_shares", tokens=5, group="softmax_sum", pages=200),
    case("gqa8_d128", heads=(8, 1), d=128, dtype=BF16),
    case("mha_d32", heads=(2, 2), d=32),
    case("d80", d=80),
    case("d96", d=96),
    case("d256", d=256, dtype=BF16),
    case("one_page", pages=1, group="softmax_max"),
    case("row", stack=(2, 1)),
    case("row_bf16", stack=(1, 2), pages=130, dtype=BF16),
    case("row_shares_bf16", mode="dot", group="softmax_sum", stack=(0, 1), dtype=BF16),
    case("several_shares_bf16", tokens=2, group="softmax_sum", pages=70, dtype=BF16),
)


def workload(
    name: str,
    *,
    batch: int,
    page: int,
    mode: str = "bound",
    group: str = "max",
    tokens: int = 1,
) -> Workload:
    """Llama-3.1-8B heads over 128k tokens, bounds or means in bfloat16."""
    h, k, d, pages = 32, 8, 128, 128 * 1024 // page
    struct = jax.ShapeDtypeStruct

    def arguments():
        q = struct((batch, h, tokens, d), jnp.bfloat16)
        pool = struct((batch, k, pages, d), jnp.bfloat16)
        kwargs: dict[str, Any] = {"mode": mode, "group": group}
        if group.startswith("softmax"):
            kwargs["scale"] = d**-0.5
        return (q, pool, pool)[: 3 if mode == "bound" else 2], kwargs

    bounds = batch * k * pages * d * 2 * (2 if mode == "bound" else 1)
    floor = bounds + batch * tokens * (h * d * 2 + k * pages * 4)
    return Workload(name=name, make=arguments, floor_bytes=floor)


WORKLOADS = (
    workload("quest_page16_b1", batch=1, page=16),
    workload("quest_page16_b16", batch=16, page=16),
    workload("means_page64_b16", batch=16, page=64, mode="dot", group="sum"),
    workload("shares_page16_b1", batch=1, page=16, mode="dot", group="softmax_sum"),
    workload("shares_page16_b16", batch=16, page=16, mode="dot", group="softmax_sum"),
    workload("quest_16_queries_b1", batch=1, page=16, tokens=16),
)
