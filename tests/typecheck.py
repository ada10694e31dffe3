"""The run-time type checker of the tests: beartype, where it can judge.

jaxtyping's import hook decorates methods one by one, and beartype then refuses
`typing.Self`, which has a meaning only inside a decorated class. Such methods go
without a check instead of going without the annotation. So do constructors: JAX
rebuilds a pytree through its own with whatever stands in for the leaves (None, specs,
`ShapeDtypeStruct`s), and that is no mistake.
"""

import os
import warnings
from collections.abc import Callable

import pytest
from beartype import beartype
from beartype.roar import (
    BeartypeDecorHintPep585DeprecationWarning,
    BeartypeDecorHintPep673Exception,
)

wrong_types = pytest.mark.skipif(
    os.environ.get("KVJAX_TYPECHECK", "0") != "0",
    reason="the type checker refuses the call before kvjax can",
)
"""Of tests that give what annotations exclude."""


def checked[F: Callable[..., object]](function: F) -> F:
    """`function`, checking its arguments and its result at every call."""
    if function.__name__ == "__init__":
        return function
    with warnings.catch_warnings():
        # Aliases of flax name `typing.Hashable`, which is not ours to change.
        warnings.simplefilter("ignore", BeartypeDecorHintPep585DeprecationWarning)
        try:
            return beartype(function)
        except BeartypeDecorHintPep673Exception:
            return function
