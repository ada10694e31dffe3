"""Decode kernels on Hopper whose products are made register by register.

One thread block per (row, KV head, split of its list). The copy engine fetches blocks
of 128 slots ahead, codes as they are; each of four warps takes 32 slots of every block
through the program of `program` with a softmax of its own, so warps never wait for one
another but for the blocks. What lies beside slots (scales per token, positions,
log-weights) is too narrow for the copy engine: lanes read it a block ahead. A small XLA
program merges the splits and warps.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kvjax.pallas_kernels import compat
from kvjax.pallas_kernels.decoding import blocks, lanes, results
from kvjax.pallas_kernels.decoding.plain import SHARED
from kvjax.pallas_kernels.decoding.program import BLOCK, Plan
from kvjax.pallas_kernels.decoding.stored import TINY, Stored
from kvjax.pallas_kernels.decoding.warps import THREADS
from kvjax.pallas_kernels.partial import Partial
from kvjax.pallas_kernels.quantized import Quantized

MOST_ROWS = 16
"""Queries of a KV head; more do not fit into registers."""

MOST_NUMBERS = 2**32
"""Of one array that lanes read beside the copy engine; they index it by a word."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A decode step as both ops hand it over.

    Attributes:
        q: `[B, K, X, D]`, all queries of a KV head.
        keys: as they lie in main memory.
        values: likewise.
        walk: of `walks`.
        far: what it reads of main memory, and `positions` and `bias`, by name.
        now: position of each query, `[B, X]`, or None.
        scale: factor on the products.
        window: of positions, or None.
        softcap: of the logits, or None.
        stages: blocks in flight, at most.
        splits: of each list.
        interpret: run in the interpreter.
    """

    q: jax.Array
    keys: Any
    values: Any
    walk: Any
    far: Mapping[str, jax.Array]
    now: jax.Array | None = None
    scale: float
    window: int | None = None
    softcap: float | None = None
    stages: int
    splits: int
    interpret: bool = False


def wanted(keys: Any, values: Any) -> bool:
    """Whether some of them are codes."""
    return isinstance(keys, Quantized) or isinstance(values, Quantized)


def refusal(
    q: jax.Array, keys: Any, values: Any, rows: int, names: tuple[str, str]
) -> str | None:
    """Why this kernel does not serve a call, or None."""
    if q.dtype == jnp.float32:
        return "`q` must be bfloat16 or float16, what a GPU multiplies; got float32"
    for name, side, axes in (
        (names[0], keys, ("channel", "token")),
        (names[1], values, ("token",)),
    ):
        if not isinstance(side, Quantized) and side.dtype not in (
            jnp.bfloat16,
            jnp.float16,
        ):
            return (
                f"`{name}` must be codes, bfloat16 or float16, what a GPU multiplies; "
                f"got {side.dtype}"
            )
        why = Stored.of(side).refusal(name, axes)
        if why:
            return why
        if isinstance(side, Quantized) and side.scale.size > MOST_NUMBERS:
            return f"`{name}` has more scales than a word counts; got {side.scale.size}"
    if rows > MOST_ROWS:
        return f"at most {MOST_ROWS} queries per KV head here; got {rows}"
    return None


def decode(call: Call) -> Partial:
    """Attention of each KV head's queries, `[B, K, X, D]`."""
    b, kv_heads, rows, d = call.q.shape
    columns = -(-rows // 8)
    plan = Plan(
        keys=Stored.of(call.keys),
        values=Stored.of(call.values),
        columns=columns,
        softcap=call.softcap,
        window=call.window,
        located="positions" in call.far,
        biased="bias" in call.far,
    )
    far = {**call.far, **_prepared(call, plan)}
    near = {**_sources("keys", call.keys), **_sources("values", call.values)}
    for name, side in (("keys", call.keys), ("values", call.values)):
        if isinstance(side, Quantized) and side.axis == "token":
            far[f"{name}_scale"] = side.scale
            if side.zero is not None:
                far[f"{name}_zero"] = side.zero
    buffers = {name: _buffer(array, step) for name, (array, step) in near.items()}
    each = sum(rows * width * size for (rows, width), _, size in buffers.values())
    # Three thread blocks of an SM hide each other's waits; each wants two stages.
    stages = min(max(2, min(call.stages, SHARED // 3 // each)), SHARED // each)
    copies = len(buffers) * (BLOCK // call.walk.piece)
    scratch = {
        name: plgpu.SMEM(
            (stages, *shape),
            dtype,
            transforms=lanes.transforms(_swizzle(name, near[name]), size),
        )
        for name, (shape, dtype, size) in buffers.items()
    }
    run = plgpu.kernel(
        functools.partial(
            blocks.kernel,
            plan=plan,
            walk=call.walk,
            splits=call.splits,
            stages=stages,
            groups={name: step for name, (_, step) in near.items()},
            swizzles={name: _swizzle(name, near[name]) for name in near},
            names=(tuple(near), tuple(far)),
            interpret=call.interpret,
        ),
        out_type=jax.ShapeDtypeStruct(
            (b, kv_heads, call.splits, plan.results, THREADS), jnp.float32
        ),
        scratch_types=dict(
            **scratch,
            here=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            done=plgpu.Barrier(),
        ),
        grid=(call.splits, kv_heads, b),
        grid_names=("split", "head", "row"),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            # `done` keeps copies behind reads.
            unsafe_no_auto_barriers=True,
        ),
        interpret=compat.gpu_interpret(call.interpret),
    )
    found = run(*(array for array, _ in near.values()), *far.values())
    part = results.collected(plan, found)
    return Partial(part.out[:, :, :rows], part.lse[:, :, :rows])


def _sources(name: str, side: Any) -> dict[str, tuple[Any, int]]:
    """What the copy engine fetches of keys or values, and slots per row of it."""
    if not isinstance(side, Quantized):
        return {name: (side, 1)}
    found = {name: (side.codes, 1)}
    if side.axis == "channel":
        found[f"{name}_scale"] = (side.scale, side.group)
        if side.zero is not None:
            found[f"{name}_zero"] = (side.zero, side.group)
    return found


def _buffer(array: Any, step: int) -> tuple[tuple[int, int], Any, int]:
    """Shape of a stage, dtype and bytes of a number."""
    return (BLOCK // step, array.shape[-1]), array.dtype, array.dtype.itemsize


def _swizzle(name: str, source: tuple[Any, int]) -> int:
    """Only what is read as matrices is permuted."""
    array, _ = source
    if name not in ("keys", "values"):
        return 16
    return lanes.swizzle_of(array.shape[-1] * array.dtype.itemsize)


def _prepared(call: Call, plan: Plan) -> dict[str, jax.Array]:
    """Queries in the dtype of their products, factors on scores, positions."""
    rows, short = call.q.shape[2], 8 * plan.columns - call.q.shape[2]
    factor = jnp.full(call.q.shape[:3], call.scale, jnp.float32)
    if plan.keys.coded:
        # Queries below 1 times a finite scale stay in the range of float16.
        wide = call.q.astype(jnp.float32)
        most = jnp.max(jnp.abs(wide), axis=-1)
        most = jnp.where(most > 0, most, 1.0)
        queries = (wide / (most[..., None] * _weights(plan))).astype(jnp.float16)
        factor = factor * most / TINY
    else:
        queries = call.q.astype(call.keys.dtype)
    pad = ((0, 0), (0, 0), (0, short))
    found = {
        "queries": jnp.pad(queries, (*pad, (0, 0))),
        "factor": jnp.pad(factor, pad),
    }
    if call.now is not None:
        assert call.now.shape[1] == rows
        now = jnp.pad(call.now, ((0, 0), (0, short)), constant_values=-1)
        found["now"] = now
    return found


def _weights(plan: Plan) -> jax.Array:
    """What each channel's code is multiplied by where it lies in a byte."""
    slab = jnp.arange(plan.keys.width) // (plan.keys.width // plan.keys.slabs)
    return jnp.exp2((plan.keys.bits * slab).astype(jnp.float32))
