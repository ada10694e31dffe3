"""Run a program for the lanes of a warpgroup inside of a kernel, or simulate it.

An array `[registers, 128]` holds registers of all lanes. In a kernel it lives in them:
`emitted` calls a program with `ptx.Emitted`; `simulated` calls the same program with
`warps.Simulated`, since the interpreter knows no instructions.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from kvjax.pallas_kernels.decoding.warps import THREADS, Simulated


@dataclasses.dataclass(frozen=True, kw_only=True)
class Near:
    """A stage of a buffer in shared memory.

    Attributes:
        ref: `[stages, rows, ...]`.
        stage: which.
        swizzle: of its tiles of 8 rows, in bytes; 16 is none.
    """

    ref: Any
    stage: Any
    swizzle: int = 16

    @property
    def width(self) -> int:
        """Bytes of a row."""
        return self.ref.shape[-1] * self.ref.dtype.itemsize


def transforms(swizzle: int, itemsize: int) -> tuple[Any, ...]:
    """Of a buffer in shared memory whose rows are read 8 at a time."""
    if swizzle == 16:
        return ()
    return (
        plgpu.TilingTransform((8, swizzle // itemsize)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
    )


def swizzle_of(width: int) -> int:
    """For rows of `width` bytes: the widest that divides them."""
    return next(x for x in (128, 64, 32, 16) if width % x == 0)


def registers(count: int) -> Any:
    """The layout of `[count, 128]`."""
    return plgpu.Layout.WG_STRIDED((count, THREADS), vec_size=1)


def filled(count: int, value: float) -> jax.Array:
    """Registers that hold one number."""
    array = jnp.full((count, THREADS), value, jnp.float32)
    return plgpu.layout_cast(array, registers(count))


def simulated(
    program: Callable[..., list],
    counts: tuple[int, Any],
    words: Sequence[Any],
    arrays: Sequence[Any],
    near: Mapping[str, Near],
    far: Mapping[str, Any],
) -> jax.Array:
    """`program(ops, words, arrays, near, far)` as an array `[registers, 128]`."""

    def run(words, arrays, near, far):
        ops = Simulated()
        with np.errstate(all="ignore"):  # infinities and NaN are part of the job
            found = program(
                ops,
                [ops.word(int(x)) for x in words],
                [list(np.asarray(x)) for x in arrays],
                {name: _bytes(x) for name, x in near.items()},
                {name: np.asarray(x) for name, x in far.items()},
            )
        return np.stack(found).astype(counts[1])

    return jax.pure_callback(
        run,
        jax.ShapeDtypeStruct((counts[0], THREADS), counts[1]),
        list(words),
        list(arrays),
        {name: one.ref[one.stage] for name, one in near.items()},
        {name: ref[...] for name, ref in far.items()},
    )


def _bytes(x):
    return np.ascontiguousarray(x).view(np.uint8)


def emitted(
    program: Callable[..., list],
    counts: tuple[int, Any],
    words: Sequence[Any],
    arrays: Sequence[Any],
    near: Mapping[str, Near],
    far: Mapping[str, Any],
) -> jax.Array:
    """The same in a kernel; `counts` are how many registers it returns, and of what."""
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector

    from kvjax.pallas_kernels.decoding import ptx

    scalar = plgpu.Layout.WG_SPLAT(())
    stages = [one.stage for one in near.values()]
    kinds = (
        [scalar] * (len(words) + len(stages)),
        [registers(x.shape[0]) for x in arrays],
        [
            plgpu.RefType(transforms(one.swizzle, one.ref.dtype.itemsize))
            for one in near.values()
        ],
        [plgpu.RefType() for _ in far],
    )
    count, dtype = counts
    layout = registers(count)

    @plgpu.inline_mgpu(
        arg_types=kinds,
        return_type=plgpu.ShapeDtypeStruct((count, THREADS), dtype, layout=layout),
    )
    def call(_, scalars, given, near_refs, far_refs):
        values = [x.registers.item() for x in scalars]
        shared = {}
        for (name, one), ref, stage in zip(
            near.items(), near_refs, values[len(words) :], strict=True
        ):
            size = one.width * one.ref.shape[1]
            base = ptx.shared_address(ref)
            base = ptx.moved(base, stage, size)
            shared[name] = ptx.Shared(base=base, width=one.width, swizzle=one.swizzle)
        lists = [
            [
                vector.extract(x, dynamic_position=[], static_position=[0])
                for x in array.registers.flat
            ]
            for array in given
        ]
        found = program(
            ptx.Emitted(),
            values[: len(words)],
            lists,
            shared,
            dict(zip(far, far_refs, strict=True)),
        )
        wide = ir.VectorType.get((1,), found[0].type)
        packed = np.asarray([vector.broadcast(wide, x) for x in found], object)
        target = layout.to_mgpu()
        return mgpu.FragmentedArray(
            _registers=packed.reshape(target.registers_shape((count, THREADS))),
            _layout=target,
            _is_signed=None if dtype == jnp.float32 else False,
        )

    # pyright does not see that the decorator drops the context.
    return call(  # pyright: ignore[reportCallIssue]
        [*words, *stages],
        list(arrays),
        [one.ref for one in near.values()],
        list(far.values()),
    )
