"""What `sparse_prefill` is tried on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.pallas_kernels.cases import Arguments, Case, Workload
from kvjax.pallas_kernels.sparse_prefill.patterns import (
    BlockList,
    Diagonals,
    Pattern,
    Shared,
)

GARBAGE = 1 << 20
"""What entries past a count hold here; no implementation may look at them."""


def choose(
    rng: np.random.Generator, shape: tuple[int, ...], among: int, capacity: int
) -> tuple[np.ndarray, np.ndarray]:
    """Distinct entries below `among`, with random counts and garbage behind them.

    The first list is full, and the last one's count is random: it may be zero.
    """
    order = np.argsort(rng.random((*shape, max(among, capacity))), axis=-1)
    index = order[..., :capacity].astype(np.int32)
    counts = rng.integers(0, min(among, capacity) + 1, shape).astype(np.int32)
    counts.flat[0] = min(among, capacity)
    index = np.where(np.arange(capacity) < counts[..., None], index, GARBAGE)
    return index.astype(np.int32), counts


def make_pattern(
    rng: np.random.Generator,
    kind: str,
    *,
    batch: int,
    lists: int,
    tokens: int,
    slots: int,
    block_q: int,
    block_k: int,
    capacity: int,
) -> Pattern:
    """A random pattern of one kind."""
    blocks = -(-slots // block_k)
    shape = (batch, lists)
    if kind == "list":
        shape = (*shape, -(-tokens // block_q))
    index, counts = (jnp.asarray(x) for x in choose(rng, shape, blocks, capacity))
    if kind == "list":
        return BlockList(index=index, counts=counts, block_q=block_q, block_k=block_k)
    if kind == "diagonals":
        return Diagonals(offsets=index, counts=counts, block=block_k)
    return Shared(index=index, counts=counts, block_q=block_q, block_k=block_k)


def attention(
    kind: str,
    *,
    heads: tuple[int, int, int] = (2, 2, 2),  # query heads, KV heads, lists
    batch: int = 1,
    tokens: int = 64,
    slots: int | None = None,
    dim: int = 32,
    blocks: tuple[int, int] = (16, 16),
    capacity: int = 3,
    dtype: str = "float32",
    starts: tuple[int, ...] | None = None,
    lengths: tuple[int, ...] | None = None,
    **settings: Any,
) -> Callable[[np.random.Generator], Arguments]:
    """The maker of one case's arguments."""

    def make(rng: np.random.Generator) -> Arguments:
        h, kv, lists = heads
        s = slots or tokens
        q = jnp.asarray(rng.standard_normal((batch, h, tokens, dim)), dtype)
        k, v = (rng.standard_normal((batch, kv, s, dim)) for _ in range(2))
        kwargs: dict[str, Any] = {"scale": dim**-0.5, **settings}
        if starts is not None:
            kwargs["q_start"] = jnp.asarray(starts, jnp.int32)
        if lengths is not None:
            kwargs["kv_len"] = jnp.asarray(lengths, jnp.int32)
            for row, length in enumerate(lengths):  # free slots hold anything
                k[row, :, length:], v[row, :, length:] = np.nan, np.inf
        pattern = make_pattern(
            rng,
            kind,
            batch=batch,
            lists=lists,
            tokens=tokens,
            slots=s,
            block_q=blocks[0],
            block_k=blocks[1],
            capacity=capacity,
        )
        return (q, jnp.asarray(k, dtype), jnp.asarray(v, dtype), pattern), kwargs

    return make


def _fits_hopper(
    dtype: str = "float32",
    dim: int = 32,
    blocks: tuple[int, int] = (16, 16),
    **_: Any,
) -> bool:
    sizes = dim in (64, 128) and blocks[0] % 64 == 0 and blocks[1] in (64, 128)
    return sizes and dtype == "bfloat16"


def _case(name: str, kind: str, *, gradient: bool = False, **kwargs: Any) -> Case:
    fields = {key: kwargs.pop(key) for key in ("slow", "tiles") if key in kwargs}
    fields.setdefault("tiles", {"columns": 32})  # two blocks per step
    if not _fits_hopper(**kwargs):
        fields["refused"] = ("gpu",)
    return Case(
        name=name,
        make=attention(kind, **kwargs),
        gradient=(0, 1, 2) if gradient else (),
        **fields,
    )


CHUNKED: dict[str, Any] = {
    "batch": 2,
    "tokens": 32,
    "slots": 80,
    "starts": (48, 16),
    "lengths": (80, 41),
}
WINDOW: dict[str, Any] = {"window": 20, "sinks": 5}
HOPPER: dict[str, Any] = {
    "blocks": (128, 128),
    "dim": 64,
    "dtype": "bfloat16",
    "capacity": 2,
    "tiles": {"columns": 256},
}

CASES = (
    _case("list", "list", gradient=True),
    _case("diagonals", "diagonals", gradient=True),
    _case("shared", "shared", gradient=True),
    _case("list-bf16", "list", dtype="bfloat16", dim=64, gradient=True),
    _case("diagonals-bf16", "diagonals", dtype="bfloat16", dim=128, slow=True),
    _case("shared-bf16", "shared", dtype="bfloat16", dim=80, slow=True),
    _case("list-gqa4", "list", heads=(4, 1, 4), gradient=True),
    _case("list-gqa4-per-kv", "list", heads=(8, 2, 2), gradient=True, slow=True),
    _case("list-gqa8-one-list", "list", heads=(8, 1, 1), gradient=True),
    _case("diagonals-gqa4-one-list", "diagonals", heads=(8, 2, 1), slow=True),
    _case("shared-gqa4-per-head", "shared", heads=(4, 1, 4), gradient=True, slow=True),
    _case("list-chunked", "list", **CHUNKED, gradient=True),
    _case("diagonals-chunked", "diagonals", **CHUNKED, gradient=True),
    _case("shared-chunked", "shared", **CHUNKED, gradient=True),
    _case("list-window-sinks", "list", **WINDOW, capacity=4, gradient=True),
    _case("diagonals-window-sinks", "diagonals", **WINDOW, capacity=4, slow=True),
    _case("shared-window", "shared", window=9, capacity=4, slow=True),
    _case("list-ragged", "list", tokens=52, slots=57, gradient=True),
    _case(
        "diagonals-ragged", "diagonals", tokens=37, slots=37, gradient=True, slow=True
    ),
    _case("shared-ragged", "shared", tokens=21, slots=50, gradient=True, slow=True),
    _case("list-rectangular", "list", blocks=(32, 16), capacity=4),
    _case("shared-rectangular", "shared", blocks=(16, 32), capacity=2, slow=True),
    _case("list-everything", "list", softcap=3.0, capacity=4, gradient=True, **WINDOW),
    _case("list-not-causal", "list", causal=False, gradient=True, slow=True),
    _case("shared-not-causal", "shared", causal=False, window=30, slow=True),
    _case("list-one-token", "list", tokens=1, slots=33, starts=(32,), lengths=(33,)),
    _case("list-empty", "list", lengths=(0,), gradient=True),
    # Sizes and dtypes that a Hopper kernel takes.
    _case("list-128", "list", **HOPPER, tokens=256, gradient=True, slow=True),
    _case(
        "diagonals-128",
        "diagonals",
        **HOPPER,
        tokens=200,
        softcap=2.0,
        gradient=True,
        slow=True,
    ),
    _case(
        "shared-64-chunked",
        "shared",
        **{**HOPPER, "blocks": (64, 64), "dim": 128, "heads": (4, 2, 2)},
        tokens=96,
        slots=200,
        starts=(100,),
        lengths=(190,),
        window=80,
        sinks=3,
        gradient=True,
    ),
    _case(
        "list-64-ragged",
        "list",
        **{**HOPPER, "blocks": (64, 64), "heads": (4, 2, 4)},
        tokens=101,
        lengths=(90,),
        gradient=True,
    ),
)


def _struct(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _workload(
    name: str,
    kind: str,
    *,
    tokens: int,
    slots: int,
    lists: int = 32,
    block: int = 128,
    density: float = 0.1,
    gradient: bool = False,
) -> Workload:
    """Llama-3.1-8B heads at batch 1 in bf16."""
    heads, kv_heads, dim = 32, 8, 128
    capacity = max(1, round(density * slots / block))
    rows = (tokens // block,) if kind == "list" else ()

    def make() -> Arguments:
        index: Any = _struct(1, lists, *rows, capacity)
        counts: Any = _struct(1, lists, *rows)
        if kind == "list":
            pattern: Pattern = BlockList(
                index=index, counts=counts, block_q=block, block_k=block
            )
        elif kind == "diagonals":
            pattern = Diagonals(offsets=index, counts=counts, block=block)
        else:
            pattern = Shared(index=index, counts=counts, block_q=block, block_k=block)
        q = _struct(1, heads, tokens, dim, dtype=jnp.bfloat16)
        k = _struct(1, kv_heads, slots, dim, dtype=jnp.bfloat16)
        kwargs: dict[str, Any] = {"scale": dim**-0.5}
        if tokens != slots:
            kwargs |= {"q_start": _struct(1), "kv_len": _struct(1)}
        return (q, k, k, pattern), kwargs

    queries, keys = heads * tokens * dim * 2, kv_heads * slots * dim * 2
    table = 4 * lists * int(np.prod(rows)) * (capacity + 1)
    # The lists are the algorithm: what they name is read for each of them, once for
    # the query heads that share one. No order of blocks is common to all lists.
    entries = lists * (tokens // block) * capacity
    named = entries * 2 * block * dim * 2
    floor = 2 * queries + named + 4 * heads * tokens + table
    if gradient:
        # dq: reads q, d_out and out (for delta), lse, delta, what is named; writes dq.
        floor += 4 * queries + named + 8 * heads * tokens + table
        # dk, dv: for each KV block the queries, d_out, lse, delta that name it.
        floor += entries * (heads // lists) * block * (2 * dim * 2 + 8) + 4 * keys
    return Workload(
        name=name,
        make=make,
        floor_bytes=floor,
        gradient=(0, 1, 2) if gradient else (),
    )


LONG = 1 << 17

WORKLOADS = (
    _workload("list-128k", "list", tokens=LONG, slots=LONG),
    _workload("list-128k-per-kv-head", "list", tokens=LONG, slots=LONG, lists=8),
    _workload("diagonals-128k", "diagonals", tokens=LONG, slots=LONG),
    _workload("shared-128k", "shared", tokens=LONG, slots=LONG),
    _workload("list-chunk-8k-of-128k", "list", tokens=1 << 13, slots=LONG),
    _workload(
        "list-32k-gradient", "list", tokens=1 << 15, slots=1 << 15, gradient=True
    ),
    _workload(
        "diagonals-32k-gradient",
        "diagonals",
        tokens=1 << 15,
        slots=1 << 15,
        gradient=True,
    ),
    _workload(
        "shared-32k-gradient", "shared", tokens=1 << 15, slots=1 << 15, gradient=True
    ),
)
