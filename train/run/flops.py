"""Operations of a traced program: matrix products, loops counted by their length."""

import math
from typing import Any

import jax


def matmul_flops(jaxpr: Any) -> int:
    """Floating-point operations of all matrix products, two for each multiply-add.

    XLA's own count takes the body of a loop once. Here a scan counts as often as it
    runs, a branch as its dearest side; other loops have no known length and count once.
    Elementwise work is left out. What is recomputed in a backward pass counts.

    Args:
        jaxpr: of the whole program, before it is split over devices.
    """
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            total += _product(eqn)
            continue
        inner = [matmul_flops(sub) for sub in _inner(eqn.params)]
        if eqn.primitive.name == "cond":
            total += max(inner, default=0)
        else:
            total += sum(inner) * eqn.params.get("length", 1)
    return total


def _product(eqn: Any) -> int:
    (contract, _), _ = eqn.params["dimension_numbers"]
    depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contract)
    return 2 * depth * math.prod(eqn.outvars[0].aval.shape)


def _inner(params: dict[str, Any]) -> list[Any]:
    leaves = jax.tree.leaves(
        list(params.values()),
        is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns"),
    )
    found = [getattr(leaf, "jaxpr", leaf) for leaf in leaves]
    return [one for one in found if hasattr(one, "eqns")]
