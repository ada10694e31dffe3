"""What `paged_decode` is tried on."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.pallas_kernels.cases import Case, Workload
from kvjax.pallas_kernels.quantized import Quantized

STORE = Mapping[str, Any]
INT8: STORE = {"bits": 8, "axis": "token", "group": 0}  # 0: all channels
KIVI4 = ({"bits": 4, "axis": "channel", "group": 16}, {"bits": 4, "axis": "token"})
HALF4 = ({**KIVI4[0], "bits_of": False}, {**KIVI4[1], "bits_of": False})
"""Scales as float16 and not as their bits."""
KIVI1 = ({"bits": 1, "axis": "channel", "group": 16}, {"bits": 1, "axis": "token"})
KIVI2 = ({"bits": 2, "axis": "channel", "group": 16}, {"bits": 2, "axis": "token"})


def make(
    rng: np.random.Generator,
    *,
    heads: tuple[int, int] = (4, 2),
    batch: int = 2,
    tokens: int = 1,
    d: int = 64,
    page: int = 16,
    pages: int = 12,
    selected: int = 5,
    counts: str = "some",
    fill: bool = False,
    bias: bool = False,
    store: tuple[STORE | None, STORE | None] = (None, None),
    dtype: Any = jnp.float32,
    softcap: float | None = None,
):
    """Distinct pages per head; what is not selected or not live holds NaN."""
    h, k = heads
    at = np.stack([rng.permutation(pages)[:selected] for _ in range(batch * k)])
    at = at.reshape(batch, k, selected)
    number = rng.integers(0, selected + 1, (batch, k))
    number[0, 0] = selected
    number[-1, -1] = {"some": 1, "all": selected, "none": 0}[counts]
    if counts != "some":
        number[...] = number[-1, -1]
    filled = rng.integers(0, page + 1, at.shape) if fill else np.full(at.shape, page)
    # A page that two heads share has as many live slots for both.
    shared = np.full(pages, page)
    np.put(shared, at.ravel(), filled.ravel())
    filled = shared[at]
    live = np.zeros((pages, page), bool)
    for row, n in zip(at.reshape(-1, selected), number.ravel(), strict=True):
        live[row[:n]] = np.arange(page) < shared[row[:n], None]
    pools = []
    for how in store:
        x = rng.standard_normal((pages, page, d)) * 1.5
        if how is None:
            pools.append(jnp.asarray(np.where(live[..., None], x, np.nan), dtype))
        else:
            pool = quantized(rng, (pages, page, d), **how)
            dead = jnp.asarray(~live.any(-1)[:, None, None])
            nan = 0x7E00 if pool.scale.dtype == jnp.int16 else jnp.nan
            scale = jnp.where(dead, jnp.asarray(nan, pool.scale.dtype), pool.scale)
            pools.append(dataclasses.replace(pool, scale=scale))
    listed = np.arange(selected) < number[..., None]
    at = np.where(listed, at, rng.choice([-1, 10**9], at.shape))
    q = jnp.asarray(rng.standard_normal((batch, h, tokens, d)), dtype)
    kwargs: dict[str, Any] = {"scale": d**-0.5}
    if softcap is not None:
        kwargs["softcap"] = softcap
    if fill:
        kwargs["fill"] = jnp.asarray(filled, jnp.int32)
    if bias:
        weight = rng.standard_normal((batch, k, selected * page))
        weight[..., ::7] = -np.inf
        kwargs["bias"] = jnp.asarray(weight, jnp.float32)
    table = (jnp.asarray(at, jnp.int32), jnp.asarray(number, jnp.int32))
    return (q, *pools, *table), kwargs


def quantized(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    *,
    bits: int,
    axis: str,
    group: int = 32,
    symmetric: bool = False,
    bits_of: bool = True,
) -> Quantized:
    """Any codes and scales; which values they came from does not matter."""
    n, page, d = shape
    group = group or d
    codes = rng.integers(0, 256, (n, page, d * bits // 8), dtype=np.uint8)
    channel = axis == "channel"
    side = (n, page // group, d) if channel else (n, page, d // group)
    scale = rng.uniform(0.5, 1.5, side) * 4 / 2**bits
    zero = rng.uniform(-3, -1, side)

    def stored(x):
        half = x.astype(np.float16)
        return jnp.asarray(half.view(np.int16) if bits_of else half)

    return Quantized(
        codes=jnp.asarray(codes),
        scale=stored(scale),
        zero=None if symmetric else stored(zero),
        bits=bits,
        axis=axis,
        group=group,
    )


def case(
    name: str,
    tiles: Mapping[str, int] | None = None,
    slow: bool = False,
    **how: Any,
) -> Case:
    """A case whose arguments are `make(rng, **how)`."""
    wide = how.get("dtype", jnp.float32) == jnp.float32
    refused = ("gpu",) if wide else ()  # its products are of 16-bit numbers
    if how.get("store") == KIVI1:
        refused = ("tpu", "gpu")
    return Case(
        name=name,
        make=functools.partial(make, **how),
        tiles=tiles or {"slots": 32},
        refused=refused,
        slow=slow,
    )


BF16 = jnp.bfloat16
WIDE = {"slots": 256}
CASES = (
    case("f32"),
    case("bf16", dtype=BF16),
    case("fill_f32", fill=True),
    case("fill_bf16", fill=True, dtype=BF16),
    case("bias", bias=True, fill=True, softcap=20.0, dtype=BF16),
    case("bias_f32", bias=True, softcap=5.0),
    case("nothing_selected", counts="none", dtype=BF16),
    case("all_listed_gqa8", heads=(8, 1), counts="all", dtype=BF16),
    case("mha_several_queries", heads=(2, 2), tokens=3, dtype=BF16),
    case("one_page", selected=1, pages=3, dtype=BF16),
    case("page32_d128", page=32, d=128, selected=3, pages=6, dtype=BF16),
    case("page64_d32", page=64, d=32, selected=2, pages=4),
    case("page128_d256", page=128, d=256, selected=2, pages=4, batch=1, dtype=BF16),
    case("d80", d=80),
    case("d96", d=96, tokens=2),
    case("page24", page=24),
    case("sixteen_queries", tokens=16, heads=(4, 1), batch=1, dtype=BF16),
    case("int8", store=(INT8, INT8), dtype=BF16),
    case("int8_f32", store=(INT8, INT8)),
    case(
        "int8_symmetric",
        store=(
            {"bits": 8, "axis": "channel", "group": 16, "symmetric": True},
            {**INT8, "symmetric": True},
        ),
        d=128,
        fill=True,
        dtype=BF16,
    ),
    case("int4", store=KIVI4, d=128, dtype=BF16),
    case("int4_f32", store=KIVI4, fill=True),
    case("int4_page64", store=KIVI4, page=64, selected=2, pages=4, bias=True),
    case("int2", store=KIVI2, d=128, page=32, selected=3, dtype=BF16),
    case("int1", store=KIVI1, d=128, page=32, selected=3, fill=True, dtype=BF16),
    case("int4_page128", store=HALF4, page=128, selected=3, pages=4, tiles=WIDE),
    case("bf16_page128_d64", page=128, selected=3, pages=4, tiles=WIDE, dtype=BF16),
    case("plain_keys", store=(None, KIVI4[1]), dtype=BF16),
    case("int4_bias", store=KIVI4, page=64, pages=4, selected=3, bias=True, dtype=BF16),
    case("int2_fill", store=KIVI2, selected=3, fill=True, dtype=BF16),
)


def workload(
    name: str,
    *,
    batch: int,
    tokens: int,
    store: tuple[STORE | None, STORE | None] = (None, None),
    context: int = 128 * 1024,
    page: int = 16,
    d: int = 128,
) -> Workload:
    """Llama-3.1-8B heads; `tokens` slots selected per KV head."""
    h, kv_heads = 32, 8
    n, c = batch * kv_heads * context // page, tokens // page
    struct = jax.ShapeDtypeStruct

    def pool(how: STORE | None):
        if how is None:
            return struct((n, page, d), jnp.bfloat16)
        shape = jax.eval_shape(
            lambda: quantized(np.random.default_rng(0), (1, page, d), **how)
        )
        return jax.tree.map(lambda x: struct((n, *x.shape[1:]), x.dtype), shape)

    def arguments():
        q = struct((batch, h, 1, d), jnp.bfloat16)
        at = struct((batch, kv_heads, c), jnp.int32)
        counts = struct((batch, kv_heads), jnp.int32)
        return (q, *map(pool, store), at, counts), {"scale": d**-0.5}

    pools = sum(
        leaf.size // n * leaf.dtype.itemsize
        for how in store
        for leaf in jax.tree.leaves(pool(how))
    )
    q_and_out = batch * h * (d * (2 + 4) + 4)
    lists = batch * kv_heads * (c + 1) * 4
    floor = batch * kv_heads * c * pools + q_and_out + lists
    return Workload(name=name, make=arguments, floor_bytes=floor)


SLOT8: STORE = {"bits": 8, "axis": "token", "group": 64}
CODES = {"int8": (SLOT8, SLOT8), "int4": KIVI4, "int2": KIVI2}
# Codes in pages of 128 slots are read in place by a TPU; the last three are refused.
WORKLOADS = (
    workload("bf16_1k_b1", batch=1, tokens=1024),
    workload("bf16_2k_b16", batch=16, tokens=2048),
    workload("bf16_page64_2k_b16", batch=16, tokens=2048, page=64),
    workload("bf16_all_32k_b4", batch=4, tokens=32768, context=32768),
    *(
        workload(
            f"{name}_page128_2k_b{batch}",
            batch=batch,
            tokens=2048,
            store=store,
            page=128,
        )
        for name, store in CODES.items()
        for batch in (1, 16)
    ),
    workload("int4_page64_2k_b16", batch=16, tokens=2048, store=KIVI4, page=64),
    workload(
        "int8_slot_scales_2k_b16", batch=16, tokens=2048, store=(INT8, INT8), page=128
    ),
    workload("heads64_2k_b16", batch=16, tokens=2048, d=64),
)
