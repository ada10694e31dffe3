"""Gradients for kernels that have none of their own."""

from collections.abc import Callable
from typing import Any

import jax


def through(kernel: Callable[..., Any], plain: Callable[..., Any], *arrays: Any) -> Any:
    """`kernel(*arrays)`, whose gradient is that of `plain`, recomputed.

    Args:
        kernel: of the forward pass.
        plain: a differentiable function of the same arrays with the same results.
        arrays: pytrees of arrays.
    """
    run = jax.custom_vjp(kernel)
    run.defvjp(
        lambda *args: (kernel(*args), args),
        lambda args, cotangents: jax.vjp(plain, *args)[1](cotangents),
    )
    return run(*arrays)
