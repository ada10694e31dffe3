"""HBM bytes that the block specs of a Pallas TPU kernel imply.

XLA's cost analysis believes what a kernel declares (`cost_estimate`), or counts each
operand once. The pipeline's own rule is exact: a block is copied when its index is not
that of the step before, so the index maps tell the bytes.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.core
import numpy as np

MOST_STEPS = 1 << 20
"""Steps of a grid that are enumerated; larger ones are bounded from above."""


def implied_bytes(jaxpr: Any) -> int | None:
    """Bytes all Pallas TPU kernels of a traced program copy, padding left out.

    Index maps that read prefetched tables depend on data: there every step that could
    name another block counts, which is what full lengths and full lists cost.

    Args:
        jaxpr: of `jax.jit(f).trace(...)`.

    Returns:
        Bytes, or None where there is no such kernel, a grid is dynamic, or a kernel
        moves an operand by copies of its own (memory space `ANY`).
    """
    total, found = 0, False
    for eqn in equations(jaxpr):
        if eqn.primitive.name != "pallas_call":
            continue
        mapping, found = eqn.params["grid_mapping"], True
        if not all(isinstance(size, int) for size in mapping.grid):
            return None
        for block in mapping.block_mappings:
            space = str(getattr(block, "transformed_block_aval", "")).lower()
            if any(word in space for word in ("<any>", "<hbm>")):
                return None
            total += visits(block, mapping.grid) * block_bytes(block)
        for table in eqn.invars[: mapping.num_index_operands]:
            total += table.aval.size * table.aval.dtype.itemsize
    return total if found else None


def equations(jaxpr: Any) -> Iterator[Any]:
    """Equations of a jaxpr and of what it calls; not those inside of a kernel."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        if eqn.primitive.name == "pallas_call":
            continue
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from equations(inner)


def block_bytes(block: Any) -> int:
    """Bytes of one block; a block that sticks out is counted whole."""
    sizes = [getattr(dim, "block_size", dim) for dim in block.block_shape]
    count = math.prod(size for size in sizes if isinstance(size, int))
    return count * np.dtype(block.array_aval.dtype).itemsize


def visits(block: Any, grid: tuple[int, ...]) -> int:
    """Copies of a block over a grid walked in order, the last axis fastest."""
    inner = block.index_map_jaxpr
    reads, prefetched = dependencies(inner.jaxpr, len(grid))
    if not prefetched and 0 < math.prod(grid) <= MOST_STEPS:
        return _changes(inner, grid)
    axes = [axis for axis in reads if grid[axis] > 1]
    return math.prod(grid[: max(axes) + 1]) if axes else 1


def dependencies(jaxpr: Any, axes: int) -> tuple[set[int], bool]:
    """Grid axes that an index map depends on, and whether it reads a table."""
    of: dict[Any, set[int]] = {v: {i} for i, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        seen = set().union(*(of.get(v, set()) for v in _variables(eqn.invars)))
        of.update({v: seen for v in eqn.outvars})
    used = set().union(*(of.get(v, set()) for v in _variables(jaxpr.outvars)))
    return {i for i in used if i < axes}, any(i >= axes for i in used)


def _variables(atoms: Any) -> list[Any]:
    return [atom for atom in atoms if not hasattr(atom, "val")]  # literals have one


def _changes(closed: Any, grid: tuple[int, ...]) -> int:
    steps = np.indices(grid, np.int32).reshape(len(grid), -1)
    tables = [None] * (len(closed.jaxpr.invars) - len(grid))

    def block_index(*at):
        return jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *at, *tables)

    columns = jax.vmap(block_index)(*steps)
    index = np.stack(
        [np.broadcast_to(np.asarray(c), steps.shape[1:]) for c in columns], 1
    )
    return 1 + int(np.any(index[1:] != index[:-1], axis=1).sum())
