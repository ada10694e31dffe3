"""Every op, every backend, every case: equal to the reference, gradients included.

Driven by the registry: an op is tested the day it is added.
"""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas_kernels.cases import Case
from kvjax.pallas_kernels.compat import gpu_target
from kvjax.pallas_kernels.registry import OPS

BOUNDS = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 4e-3}
"""Relative to the largest entry; the reference computes in float32 throughout."""


def cases() -> list:
    found = []
    for name, op in OPS.items():
        module = importlib.import_module(f"kvjax.pallas_kernels.{name}.cases")
        for case in module.CASES:
            for backend in op.backends:
                if backend == "reference":
                    continue
                kind = f"{name}-{backend}"
                if backend in ("tpu", "gpu"):
                    marks = [pytest.mark.interpret, pytest.mark.sweep(0, 4, kind=kind)]
                else:
                    marks = [pytest.mark.sweep(6, 12, kind=kind)]
                marks += [pytest.mark.slow] if case.slow else []
                label = f"{name}-{backend}-{case.name}"
                found.append(pytest.param(name, backend, case, marks=marks, id=label))
    return found


def arguments(name: str, case: Case):
    return case.make(np.random.default_rng(hash_of(name + case.name)))


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode()[-6:], "little")


def public(name: str):
    return getattr(importlib.import_module(f"kvjax.pallas_kernels.{name}"), name)


def options(backend: str, case: Case) -> dict:
    if backend not in ("tpu", "gpu"):
        return {"backend": backend}
    return {"backend": backend, "tiles": dict(case.tiles) or None, "interpret": True}


def assert_close(got, want, dtype) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape
        if jnp.issubdtype(b.dtype, jnp.integer):
            np.testing.assert_array_equal(a, b)
            continue
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        finite = np.isfinite(b)
        np.testing.assert_array_equal(np.where(finite, 0, a), np.where(finite, 0, b))
        largest = np.max(np.abs(b[finite]), initial=1.0)
        np.testing.assert_allclose(
            a[finite], b[finite], rtol=0, atol=BOUNDS[dtype] * largest
        )


def dtype_of(args) -> str:
    floats = {
        jnp.dtype(x.dtype).name
        for x in jax.tree.leaves(args)
        if jnp.issubdtype(x.dtype, jnp.floating)
    }
    # Scales are float16 by design; they are exact in every implementation.
    return max(floats - {"float16"} or floats, key=lambda name: BOUNDS[name])


def run(name, backend, case, args, kwargs):
    """The op on one backend, refused where the case says so."""
    call = public(name)
    if backend in case.refused:
        with pytest.raises(NotImplementedError, match=re.escape(name)):
            call(*args, **kwargs, **options(backend, case))
        return None
    with gpu_target(backend == "gpu"):
        return call(*args, **kwargs, **options(backend, case))


@pytest.mark.parametrize(("name", "backend", "case"), cases())
def test_forward(name, backend, case):
    args, kwargs = arguments(name, case)
    want = public(name)(*args, **kwargs, backend="reference")
    got = run(name, backend, case, args, kwargs)
    if got is not None:
        assert_close(got, want, dtype_of(args))


@pytest.mark.parametrize(
    ("name", "backend", "case"),
    [
        param
        for param in cases()
        if param.values[2].gradient and param.values[1] not in param.values[2].refused
    ],
)
def test_gradient(name, backend, case):
    args, kwargs = arguments(name, case)

    def loss(where: str):
        def value(*moving):
            full = list(args)
            for index, one in zip(case.gradient, moving, strict=True):
                full[index] = one
            how = options(where, case) if where != "reference" else {"backend": where}
            leaves = jax.tree.leaves(public(name)(*full, **kwargs, **how))
            total = 0.0
            for i, leaf in enumerate(leaves):
                leaf = jnp.where(jnp.isfinite(leaf), leaf, 0).astype(jnp.float32)
                wave = jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32) + i)
                total = total + jnp.sum(leaf * wave.reshape(leaf.shape))
            return total

        return value

    moving = tuple(args[index] for index in case.gradient)
    argnums = tuple(range(len(moving)))
    want = jax.grad(loss("reference"), argnums)(*moving)
    with gpu_target(backend == "gpu"):
        got = jax.grad(loss(backend), argnums)(*moving)
    assert_close(got, want, dtype_of(args))
