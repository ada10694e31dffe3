"""Numbers of 32 bits inside, whatever is set outside."""

import functools
from collections.abc import Callable

import jax


def narrow[**P, R](fn: Callable[P, R]) -> Callable[P, R]:
    """`fn` as it is without 64-bit types (`JAX_ENABLE_X64`), also if they are on.

    Lengths and positions are int32, scores and logits float32: with 64-bit types on,
    counters, sums of integers and random numbers would be wider than what they meet.
    Every entry point is made so; what comes in of 64 bits is cast where it is checked.
    """

    @functools.wraps(fn)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.enable_x64(False):
            return fn(*args, **kwargs)

    return called
