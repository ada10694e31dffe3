"""Every op, every backend, every case: equal to the reference, gradients included.

Driven by the registry: an op is tested the day it is added.
"""

import functools
import re

import jax
import pytest

from kvjax.pallas_kernels.compat import gpu_target
from kvjax.pallas_kernels.parity import (
    KERNELS,
    arguments,
    assert_close,
    cases_of,
    dtype_of,
    gradients,
    options,
    public,
)
from kvjax.pallas_kernels.registry import OPS


def cases() -> list:
    found = []
    for name, op in OPS.items():
        for case in cases_of(name):
            for backend in op.backends:
                if backend == "reference":
                    continue
                kind = f"{name}-{backend}"
                if backend in KERNELS:
                    marks = [pytest.mark.interpret, pytest.mark.sweep(0, 2, kind=kind)]
                else:
                    marks = [pytest.mark.sweep(2, 5, kind=kind)]
                marks += [pytest.mark.slow] if case.slow else []
                label = f"{name}-{backend}-{case.name}"
                found.append(pytest.param(name, backend, case, marks=marks, id=label))
    return found


def together(backend, call, args):
    """`call(*args)` as one program: that compiles sooner than its operations do.

    Not in an interpreter: its callbacks may wait for the thread that the program has.
    """
    return call(*args) if backend in KERNELS else jax.jit(call)(*args)


def run(name, backend, case, args, kwargs):
    """The op on one backend, refused where the case says so."""
    how = options(backend, case, interpret=True)
    call = functools.partial(public(name), **kwargs, **how)
    if backend in case.refused:
        with pytest.raises(NotImplementedError, match=re.escape(name)):
            call(*args)
        return None
    with gpu_target(backend == "gpu"):
        return together(backend, call, args)


@pytest.mark.parametrize(("name", "backend", "case"), cases())
def test_forward(name, backend, case):
    args, kwargs = arguments(name, case)
    reference = functools.partial(public(name), **kwargs, backend="reference")
    want = together("reference", reference, args)
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

    def slopes(backend, how):
        return together(backend, lambda *x: gradients(name, case, x, kwargs, how), args)

    want = slopes("reference", {"backend": "reference"})
    with gpu_target(backend == "gpu"):
        got = slopes(backend, options(backend, case, interpret=True))
    assert_close(got, want, dtype_of(args))
