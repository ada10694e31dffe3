"""Vectors of a group one after the other, in a TPU's VMEM.

`[n * J, D]` to `[n, J * D]` moves rows into lanes, which XLA does with a copy in HBM.
Here a product with a permutation sorts some rows by their place in the group, and slabs
of them are stored side by side: exact, and a few percent of the scores' own product.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LANES = 128
MOST = 32
"""Vectors of a group: beyond, the permutation would cost too much."""


def at_once(dtype) -> int:
    """Groups per product: rows of one tile of the stored type."""
    return 32 // jnp.dtype(dtype).itemsize


def possible(vectors: int, d: int, dtype, *tiles: int) -> bool:
    """Whether `groups` can do it: whole lanes, and tiles of whole products."""
    whole = not any(tile % at_once(dtype) for tile in tiles)
    return 1 < vectors <= MOST and d % LANES == 0 and whole


def groups(from_ref, to_ref, vectors: int, left, backwards: bool) -> None:
    """`to_ref[g, j * D:][:D] = from_ref[g * J + j]`, or `J - 1 - j` if `backwards`.

    Args:
        from_ref: `[n * J, D]`.
        to_ref: `[n, J * D]`.
        vectors: `J`; 1 copies.
        left: rows that exist; others hold anything and become 0.
        backwards: order of the vectors.
    """
    if vectors == 1:
        to_ref[...] = from_ref[...]
        return
    d, dtype = from_ref.shape[1], from_ref.dtype
    some = at_once(dtype)
    rows = some * vectors
    row = jax.lax.broadcasted_iota(jnp.int32, (rows, rows), 0)
    source = jax.lax.broadcasted_iota(jnp.int32, (rows, rows), 1)
    j = row // some
    j = vectors - 1 - j if backwards else j
    order = (source == row % some * vectors + j).astype(jnp.float32).astype(dtype)
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def step(at, _):
        here = at * rows
        x = from_ref[pl.ds(pl.multiple_of(here, rows), rows)]
        exists = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0) < left - here
        x = jnp.where(exists, x, jnp.zeros_like(x))  # 0 * NaN is NaN
        x = jnp.dot(order, x, precision=exact, preferred_element_type=jnp.float32)
        to = pl.ds(pl.multiple_of(at * some, some), some)
        for j in range(vectors):
            slab = x[j * some : (j + 1) * some].astype(dtype)
            to_ref[to, j * d : (j + 1) * d] = slab
        return 0

    jax.lax.fori_loop(0, from_ref.shape[0] // rows, step, 0)
