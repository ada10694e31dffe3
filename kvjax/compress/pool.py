"""One buffer for the bodies of layers of which each keeps another number of slots.

Layers are built in a loop, so all of them in arrays of one size, the largest; each is
then poured into its own piece of a buffer that is exactly as long as all need. How long
a piece is may depend on the data, and on the row: what the data do not change is the
length of all pieces together.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kvjax.cache import Ragged, Slots
from kvjax.codecs import AbstractCodec, AbstractEncoded
from kvjax.compress.survey import Layout
from kvjax.types import EMPTY, LayerSpec


def aligned(slots: tuple[int, ...], layout: Layout, kv_heads: int) -> tuple[int, ...]:
    """Slots of each layer's piece, of all heads, in multiples of what codecs group.

    Args:
        slots: of each, as `Survey.slots` has them.
        layout: of all of these layers.
        kv_heads: of each.
    """
    multiple, heads = layout.plan.store.multiple, 1 if layout.shared else kv_heads
    return tuple(heads * -(-n // multiple) * multiple for n in slots)


def empty_pool(
    layout: Layout, slots: tuple[int, ...], spec: LayerSpec, batch: int, dtype
) -> Ragged:
    """A buffer for layers of one kind, with nothing in it.

    Args:
        layout: of all of these layers.
        slots: of each, as `Survey.slots` has them.
        spec: of all of them.
        batch: rows.
        dtype: of keys and values.
    """
    store = layout.plan.store
    total = sum(aligned(slots, layout, spec.num_kv_heads))
    (widest,) = aligned((layout.slots,), layout, spec.num_kv_heads)
    evict = layout.plan.evict
    if evict is not None and evict.budget.surveys:
        # However they share, each piece ends at a multiple; one may be all there is.
        most = sum(slots) + len(slots) * (store.multiple - 1)
        total = most // store.multiple * store.multiple
        widest = min(widest, total)
    shape = (batch, total, spec.head_dim)

    def blank(codec: AbstractCodec) -> AbstractEncoded:
        def encoded():
            live = jnp.zeros(shape[:2], bool)
            positions = jnp.full(shape[:2], EMPTY, jnp.int32)
            return codec.encode(jnp.zeros(shape, dtype), live, positions, spec.rope)

        made = jax.eval_shape(encoded)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made)

    return Ragged(
        keys=blank(store.keys),
        values=blank(store.values),
        positions=jnp.full(shape[:2], EMPTY, jnp.int32),
        offsets=jnp.zeros((len(slots), batch, spec.num_kv_heads + 1), jnp.int32),
        widest=widest,
    )


def pour(
    pool: Ragged,
    part: Slots | Ragged,
    turn: Int[Array, ""] | int,
    first: Int[Array, "B"],
    count: Int[Array, "B"],
) -> Ragged:
    """`pool` with one layer's body in its piece.

    Args:
        pool: of the layers.
        part: the body, in as many slots as the largest of them; what it holds is at
            the start of each head, and fits.
        turn: which of the layers.
        first: slot where the piece of each row begins, a multiple of what codecs group.
        count: slots of the piece, likewise.
    """
    if isinstance(part, Slots):
        heads = part.positions.shape[1]
        each = count // heads
        inside = each[:, None] * jnp.arange(heads + 1, dtype=jnp.int32)
    else:
        each, inside = count, part.offsets
    total = pool.positions.shape[-1]

    def into(old: Array, new: Array) -> Array:
        unit = total // old.shape[-2]  # slots of an entry: 1, or a group of codes

        def row(old: Array, new: Array, first, count, each) -> Array:
            if isinstance(part, Slots):
                new = _in_line(new, each // unit)
            new = new[: old.shape[-2]]
            width = new.shape[-2]
            # At the end the piece is narrower than what is poured: what lies in front
            # of it stays.
            start = jnp.minimum(first // unit, old.shape[-2] - width)
            shift = first // unit - start
            here = jax.lax.dynamic_slice_in_dim(old, start, width, axis=0)
            entry = jnp.arange(width)
            mine = (entry >= shift) & (entry < shift + count // unit)
            new = jnp.take(new, jnp.clip(entry - shift, 0, width - 1), axis=0)
            new = jnp.where(mine[:, None], new.astype(old.dtype), here)
            return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=0)

        return jax.vmap(row)(old, new, first, count, each)

    offsets = first[:, None] + inside
    return Ragged(
        keys=jax.tree.map(into, pool.keys, part.keys),
        values=jax.tree.map(into, pool.values, part.values),
        positions=into(pool.positions[..., None], part.positions[..., None])[..., 0],
        offsets=jax.lax.dynamic_update_index_in_dim(pool.offsets, offsets, turn, 0),
        widest=pool.widest,
    )


def _in_line(x: Array, each: Array) -> Array:
    """`[K, C, W]` as `[K * C, W]`, the first `each` of every head in front."""
    heads, entries, width = x.shape
    at = jnp.arange(heads * entries)
    head = jnp.minimum(at // jnp.maximum(each, 1), heads - 1)
    at = head * entries + jnp.minimum(at - head * each, entries - 1)
    return jnp.take(x.reshape(heads * entries, width), at, axis=0)
