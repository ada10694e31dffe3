"""One buffer for the bodies of layers of which each keeps another number of slots.

Layers are built in a loop, so all of them in arrays of one size, the largest; each is
then poured into its own piece of a buffer that is exactly as long as all need.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kvjax.cache import Ragged, Slots
from kvjax.codecs import AbstractCodec, AbstractEncoded
from kvjax.compress.config import Compression
from kvjax.compress.survey import Layout
from kvjax.types import EMPTY, LayerSpec


def empty_pool(
    c: Compression,
    layout: Layout,
    slots: tuple[int, ...],
    spec: LayerSpec,
    batch: int,
    dtype: jnp.dtype,
) -> Ragged:
    """A buffer for layers of one kind, with nothing in it.

    Args:
        c: what is done.
        layout: of all of these layers.
        slots: of each, as `Survey.slots` has them.
        spec: of all of them.
        batch: rows.
        dtype: of keys and values.
    """
    multiple = math.lcm(c.store.keys.append_multiple, c.store.values.append_multiple)
    heads = 1 if _shared(layout) else spec.num_kv_heads
    sizes = [heads * -(-n // multiple) * multiple for n in slots]
    edges = np.cumsum([0, *sizes])
    shape = (batch, int(edges[-1]), spec.head_dim)

    def blank(codec: AbstractCodec) -> AbstractEncoded:
        def encoded():
            live = jnp.zeros(shape[:2], bool)
            positions = jnp.full(shape[:2], EMPTY, jnp.int32)
            return codec.encode(jnp.zeros(shape, dtype), live, positions, spec.rope)

        made = jax.eval_shape(encoded)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made)

    return Ragged(
        keys=blank(c.store.keys),
        values=blank(c.store.values),
        positions=jnp.full(shape[:2], EMPTY, jnp.int32),
        offsets=jnp.zeros((len(slots), batch, spec.num_kv_heads + 1), jnp.int32),
        edges=tuple(edges.tolist()),
    )


def _shared(layout: Layout) -> bool:
    """Whether the heads of a layer share its slots."""
    return layout.evict is not None and layout.evict.budget.per_head


def pour(pool: Ragged, part: Slots | Ragged, turn: Int[Array, ""]) -> Ragged:
    """`pool` with one layer's body in its piece.

    Args:
        pool: of the layers.
        part: the body, in as many slots as the largest of them; what it holds is at
            the start of each head, and fits.
        turn: which of the layers.
    """
    edges = jnp.asarray(pool.edges, jnp.int32)
    first = edges[turn]
    count = edges[turn + 1] - first
    if isinstance(part, Slots):
        heads = part.positions.shape[1]
        each = count // heads
        offsets = jnp.broadcast_to(
            first + each * jnp.arange(heads + 1, dtype=jnp.int32),
            pool.offsets.shape[1:],
        )
    else:
        each, offsets = count, first + part.offsets
    total = pool.positions.shape[-1]

    def into(old: Array, new: Array) -> Array:
        unit = total // old.shape[-2]  # slots of an entry: 1, or a group of codes
        if isinstance(part, Slots):
            new = _in_line(new, each // unit)
        new = new[:, : old.shape[-2]]
        width = new.shape[-2]
        # At the end the piece is narrower than what is poured: what lies in front of
        # it stays.
        start = jnp.minimum(first // unit, old.shape[-2] - width)
        shift = first // unit - start
        here = jax.lax.dynamic_slice_in_dim(old, start, width, axis=1)
        entry = jnp.arange(width)
        mine = (entry >= shift) & (entry < shift + count // unit)
        new = jnp.take(new, jnp.clip(entry - shift, 0, width - 1), axis=1)
        new = jnp.where(mine[:, None], new.astype(old.dtype), here)
        return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1)

    return Ragged(
        keys=jax.tree.map(into, pool.keys, part.keys),
        values=jax.tree.map(into, pool.values, part.values),
        positions=into(pool.positions[..., None], part.positions[..., None])[..., 0],
        offsets=jax.lax.dynamic_update_index_in_dim(pool.offsets, offsets, turn, 0),
        edges=pool.edges,
    )


def _in_line(x: Array, each: Array) -> Array:
    """`[B, K, C, W]` as `[B, K * C, W]`, the first `each` of every head in front."""
    batch, heads, entries, width = x.shape
    at = jnp.arange(heads * entries)
    head = jnp.minimum(at // each, heads - 1)
    at = head * entries + jnp.minimum(at - head * each, entries - 1)
    return jnp.take(x.reshape(batch, heads * entries, width), at, axis=1)
