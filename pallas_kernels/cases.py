"""What every op is tried on: small cases for parity, real sizes for compilers.

`<op>/cases.py` defines `CASES` and `WORKLOADS`; tests, `make kernels` and the
benchmarks read them from there, so that a case written once is run everywhere.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Small arguments on which all implementations must agree with the reference.

    Attributes:
        name: unique within the op; the test id.
        make: `rng -> (args, kwargs)` of the op's public function.
        tiles: block sizes for the Pallas backends, small enough that several blocks
            and a ragged last one occur.
        gradient: positions of the arguments whose gradients are compared.
        refused: backends that refuse this case with `NotImplementedError`.
        slow: left out of the fast tests.
    """

    name: str
    make: Callable[[np.random.Generator], Arguments]
    tiles: Mapping[str, Any] = MappingProxyType({})
    gradient: tuple[int, ...] = ()
    refused: tuple[str, ...] = ()
    slow: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A realistic size that the real compilers must accept.

    Attributes:
        name: for the table.
        make: `() -> (args, kwargs)` with `jax.ShapeDtypeStruct` for arrays.
        floor_bytes: bytes that any implementation has to move: codes, side state,
            queries, outputs, each once.
        gradient: compile the backward pass too, with respect to these arguments.
    """

    name: str
    make: Callable[[], Arguments]
    floor_bytes: int
    gradient: tuple[int, ...] = ()
