"""Whether an implementation agrees with its reference, for tests and for devices.

Whatever runs the cases of `<op>/cases.py` compares by the one rule that is here.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.pallas_kernels.cases import Arguments, Case
from kvjax.pallas_kernels.registry import OPS

BOUNDS = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 4e-3}
"""Relative to the largest entry; the reference computes in float32 throughout."""

KERNELS = ("tpu", "gpu")


def public(name: str) -> Callable[..., Any]:
    """The public function of an op."""
    return getattr(importlib.import_module(f"kvjax.pallas_kernels.{name}"), name)


def cases_of(name: str) -> tuple[Case, ...]:
    """The small cases of an op."""
    return importlib.import_module(f"kvjax.pallas_kernels.{name}.cases").CASES


def served(backend: str) -> Iterator[tuple[str, Case]]:
    """Every op and case that a backend has to serve."""
    for name, op in OPS.items():
        if backend in op.backends:
            yield from ((name, c) for c in cases_of(name) if backend not in c.refused)


def arguments(name: str, case: Case) -> Arguments:
    """The arguments of a case, the same in every process."""
    seed = int.from_bytes((name + case.name).encode()[-6:], "little")
    return case.make(np.random.default_rng(seed))


def options(backend: str, case: Case, interpret: bool) -> dict[str, Any]:
    """Keywords that choose a backend; the block sizes of a kernel are the case's."""
    if backend not in KERNELS:
        return {"backend": backend}
    tiles = dict(case.tiles) or None
    return {"backend": backend, "tiles": tiles, "interpret": interpret}


def dtype_of(args: Any) -> str:
    """Name of the dtype whose bound holds: the coarsest that is given."""
    floats = {
        jnp.dtype(x.dtype).name
        for x in jax.tree.leaves(args)
        if jnp.issubdtype(x.dtype, jnp.floating)
    }
    # Scales are float16 by design; they are exact in every implementation.
    return max(floats - {"float16"} or floats, key=lambda name: BOUNDS[name])


def worst(got: Any, want: Any) -> float:
    """The largest difference, relative to the largest entry of its array.

    Raises:
        AssertionError: shapes, integers, or what is not finite, differ.
    """
    found = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape, f"shape {a.shape}, expected {b.shape}"
        if jnp.issubdtype(b.dtype, jnp.integer):
            np.testing.assert_array_equal(a, b)
            continue
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        finite = np.isfinite(b)
        np.testing.assert_array_equal(np.where(finite, 0, a), np.where(finite, 0, b))
        largest = np.max(np.abs(b[finite]), initial=1.0)
        apart = np.max(np.abs(a[finite] - b[finite]), initial=0.0)
        found = max(found, float(apart / largest))
        assert not np.isnan(apart), "NaN where the reference is finite"
    return found


def assert_close(got: Any, want: Any, dtype: str) -> None:
    """Refuse what differs from the reference by more than the dtype's bound."""
    apart = worst(got, want)
    assert apart <= BOUNDS[dtype], f"{apart:.3g} apart, bound {BOUNDS[dtype]}"


def gradients(
    name: str, case: Case, args: tuple, kwargs: dict[str, Any], how: dict[str, Any]
) -> tuple[Any, ...]:
    """Gradients of a fixed weighting of all results, for the case's arguments."""

    def value(*moving):
        full = list(args)
        for index, one in zip(case.gradient, moving, strict=True):
            full[index] = one
        total = 0.0
        for i, leaf in enumerate(jax.tree.leaves(public(name)(*full, **kwargs, **how))):
            leaf = jnp.where(jnp.isfinite(leaf), leaf, 0).astype(jnp.float32)
            wave = jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32) + i)
            total = total + jnp.sum(leaf * wave.reshape(leaf.shape))
        return total

    moving = tuple(args[index] for index in case.gradient)
    return jax.grad(value, tuple(range(len(moving))))(*moving)
