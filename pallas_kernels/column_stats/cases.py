"""What `column_stats` is tried on."""

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
    d: int = 32,
    last: int | None = None,
    dtype: Any = jnp.float32,
    weighted: bool = False,
    normalised: bool = False,
    scattered: bool = False,
    dead_queries: int = 0,
    **options: Any,
):
    """Queries at the positions that end at `last`; keys behind row lengths are NaN."""
    q = rng.standard_normal((b, h, t, d))
    keys = rng.standard_normal((b, k, s, d))
    last = s - 1 if last is None else last
    q_positions = np.broadcast_to(np.arange(last - t + 1, last + 1), (b, t)).copy()
    q_positions[:, :dead_queries] = -1
    q_positions = np.maximum(q_positions, -1)
    k_positions = np.broadcast_to(np.arange(s), (b, s)).copy()
    for row in range(b):
        k_positions[row, s - 5 * row :] = -1
        q_positions[row] = np.where(
            q_positions[row] < s - 5 * row, q_positions[row], -1
        )
    if scattered:
        k_positions = np.sort(rng.permuted(np.arange(2 * s))[:s])[None].repeat(b, 0)
        k_positions[:, 3] = -1
        q_positions = np.broadcast_to(
            np.sort(rng.permuted(np.arange(2 * s))[:t]), (b, t)
        )
    keys = np.where((k_positions >= 0)[:, None, :, None], keys, np.nan)
    q = np.where((q_positions >= 0)[:, None, :, None], q, np.nan)
    weights = jnp.asarray(rng.uniform(size=(b, h, t)), jnp.float32)
    arrays = (
        jnp.asarray(q, dtype),
        jnp.asarray(keys, dtype),
        jnp.asarray(q_positions, jnp.int32),
        jnp.asarray(k_positions, jnp.int32),
    )
    kwargs = {"scale": d**-0.5, "weights": weights if weighted else None, **options}
    if normalised:
        kwargs["lse"] = log_sum_exp(*arrays, d**-0.5)
    return arrays, kwargs


def log_sum_exp(q, keys, q_positions, k_positions, scale):
    """What an attention over the same keys knows already."""
    keys = jnp.where((k_positions >= 0)[:, None, :, None], keys, 0)
    keys = jnp.repeat(keys, q.shape[1] // keys.shape[1], axis=1)
    logits = scale * jnp.einsum("BHTD,BHSD->BHTS", q, keys).astype(jnp.float32)
    at_q, at_k = q_positions[:, None, :, None], k_positions[:, None, None]
    seen = (at_k >= 0) & (at_k <= at_q)
    return jax.nn.logsumexp(jnp.where(seen, logits, -jnp.inf), axis=-1)


HALF: dict[str, Any] = {"dtype": jnp.bfloat16}
TILES = {"block_q": 128, "block_k": 128}


def case(name: str, gradient=(), refused=(), slow=False, **how) -> Case:
    """A case whose arguments are `make(rng, **how)`."""
    if how.get("dtype", jnp.float32) == jnp.float32:
        refused = (*refused, "gpu")  # what tensor cores do not multiply
    return Case(
        name=name,
        make=functools.partial(make, **how),
        tiles=TILES,
        gradient=gradient,
        refused=tuple(refused),
        slow=slow,
    )


CASES = (
    case("window", t=24, s=200, d=64, slash=True),
    case("all_queries", t=160, s=160, d=64, h=4, k=1, slash=True, gradient=(0, 1)),
    case("grouped8", t=8, s=96, d=128, h=8, weighted=True),
    case("heads_alike", b=2, t=16, s=130, d=32, h=2, k=2, slash=True, weighted=True),
    case("bfloat16", b=2, t=64, s=256, d=128, h=4, k=2, dtype=jnp.bfloat16, slash=True),
    case("sliding", t=40, s=150, d=80, window=17, slash=True),
    case("softcap", t=16, s=128, d=96, softcap=2.0),
    case("one_query", t=1, s=70, d=64, slash=True),
    case("one_token", t=1, s=1, d=64, slash=True),
    case("wide_heads", t=16, s=128, d=256, dtype=jnp.bfloat16),
    case("dead_queries", t=32, s=100, d=64, dead_queries=20, slash=True),
    case("no_queries", t=8, s=100, d=64, dead_queries=8, slash=True),
    case("scattered", b=2, t=24, s=120, d=64, scattered=True, slash=True),
    case("lse_given", b=2, t=24, s=200, d=64, h=4, k=2, slash=True, normalised=True),
    case("lse_of_dead", t=32, s=100, d=64, dead_queries=20, normalised=True),
    # Dtypes that tensor cores multiply.
    case("bfloat16_all", t=140, s=140, d=64, gradient=(0, 1), **HALF),
    case(
        "bfloat16_sliding", t=70, s=300, d=80, window=33, softcap=2.0, slow=True, **HALF
    ),
    case("bfloat16_one_query", t=1, s=70, d=64, weighted=True, **HALF),
    case("bfloat16_dead", t=32, s=100, d=128, dead_queries=20, slash=True, **HALF),
    case("bfloat16_slash", t=70, s=150, d=64, window=40, slash=True, **HALF),
    case(
        "bfloat16_many_slashed",
        t=513,
        s=520,
        d=32,
        slash=True,
        refused=("gpu",),
        slow=True,
        **HALF,
    ),
    case("bfloat16_none", t=8, s=100, d=32, dead_queries=8, weighted=True, **HALF),
    case("bfloat16_scattered", b=2, t=24, s=120, d=96, scattered=True, **HALF),
    case(
        "bfloat16_heads",
        b=2,
        t=130,
        s=390,
        d=64,
        h=4,
        k=2,
        weighted=True,
        slow=True,
        **HALF,
    ),
    case("many_blocks", b=2, t=300, s=520, d=64, h=4, k=2, slash=True, slow=True),
)


def workload(name: str, batch: int, tokens: int, queries: int, slash=False) -> Workload:
    """Llama-3.1-8B heads in bfloat16; the queries are the last ones of the prompt."""
    h, k, d = 32, 8, 128

    def arguments():
        struct = jax.ShapeDtypeStruct
        arrays = (
            struct((batch, h, queries, d), jnp.bfloat16),
            struct((batch, k, tokens, d), jnp.bfloat16),
            struct((batch, queries), jnp.int32),
            struct((batch, tokens), jnp.int32),
        )
        return arrays, {"scale": d**-0.5, "slash": slash}

    outs = (3 if slash else 2) * batch * h * tokens * 4
    floor = batch * (h * queries + k * tokens) * d * 2 + outs
    floor += batch * (queries + tokens) * 4
    return Workload(name=name, make=arguments, floor_bytes=floor)


LONG = 128 * 1024
WORKLOADS = (
    workload("window64_128k_b1", 1, LONG, 64),
    workload("window64_128k_b16", 16, LONG, 64),
    workload("window64_slash_128k_b1", 1, LONG, 64, slash=True),
    workload("all_32k_b1", 1, 32 * 1024, 32 * 1024),
)
