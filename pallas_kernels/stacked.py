"""The caches of many layers along one leading axis: which rows of it a call reads.

An op with `row` reads, for query row `b`, row `row + b` of its stored arrays. That is
how a layer's cache is read where it lies in the stack: a slice of the stack would be a
copy in every layer and step.
"""

from typing import Any

import jax
from jaxtyping import Array

from kvjax.pallas_kernels import checks


def check(name: str, array: Any, batch: int, row: Array | None) -> None:
    """Refuse stored arrays that have not the rows a call reads.

    Args:
        name: of the argument.
        array: anything with a `shape`, rows first.
        batch: rows of queries, `B`.
        row: the first row that is read, or None for rows 0 to `B - 1` of as many.
    """
    if not array.shape:
        return  # `checks.shape` says what it should be
    got = array.shape[0]
    if row is None and got != batch:
        raise ValueError(
            f"`{name}` must have the rows of `q`, B={batch}, without `row`; got {got}. "
            "Pass `row`, the first one to read."
        )
    if got < batch:
        raise ValueError(
            f"`{name}` must have at least the rows of `q`, B={batch}, with `row`; got "
            f"{got}. Stack the rows of all layers along the first axis."
        )


def check_row(row: Array | None) -> None:
    """Refuse anything but a scalar, or None."""
    if row is None:
        return
    if row.shape:
        raise ValueError(
            f"`row` must be a scalar, or None; got {list(row.shape)}. Queries of one "
            "call read consecutive rows."
        )
    checks.integers("row", row)


def rows(tree: Any, row: Array | None, count: int) -> Any:
    """`count` rows of every leaf from `row` on; a copy unless `row` is None."""
    if row is None:
        return tree
    # XLA would fuse an update of the stack with this slice of it, which then reads the
    # stack before the update: two stacks at once, and a copy of all of it.
    tree = jax.lax.optimization_barrier(tree)
    return jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, row, count, axis=0), tree
    )
