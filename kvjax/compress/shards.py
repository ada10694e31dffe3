"""Buffers of several heads on a mesh that splits heads: a piece for each device.

Where all heads of a layer have as many slots, that changes where things lie. Where they
share, the heads of a device share what is theirs: an equal part of the layer's slots,
to the slot, so that nothing has to be known of other devices, and their sum is what it
was. Which tokens stay is then not what it is on one device, so it has to be asked for
(`shared_slots` in the rules); else these buffers are whole on every device.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from kvjax import axes
from kvjax.cache import head_ways
from kvjax.compress.survey import Layout
from kvjax.types import LayerSpec


def ways_of(layout: Layout, batch: int, spec: LayerSpec) -> int:
    """Pieces of a layer's buffer.

    Raises:
        ValueError: the rules split shared slots otherwise than heads.
    """
    ways = head_ways(batch, spec.num_kv_heads)
    evict, store = layout.plan.evict, layout.plan.store
    if ways == 1 or not layout.pooled:
        return 1
    if any(codec.observes for codec in store.codecs):
        return 1
    if not layout.shared:
        return ways
    assert evict is not None
    asked = axes.rule("shared_slots")
    if asked is None or not evict.budget.parts or evict.merge is not None:
        return 1
    if asked != axes.rule("kv_heads"):
        raise ValueError(
            "the heads of a device share slots, so the rules split `shared_slots` like "
            f"`kv_heads`, or not at all; got {asked!r} and {axes.rule('kv_heads')!r}. "
            "Give both the same axis, or `shared_slots` None."
        )
    return ways


def local(layout: Layout, spec: LayerSpec, ways: int) -> tuple[Layout, LayerSpec]:
    """Layout and spec of one piece."""
    if ways == 1:
        return layout, spec
    if layout.shared:
        layout = dataclasses.replace(layout, slots=-(-layout.slots // ways))
    return layout, dataclasses.replace(
        spec,
        num_heads=spec.num_heads // ways,
        num_kv_heads=spec.num_kv_heads // ways,
        head_ranks=(),
    )


def parted(total: Int[Array, "B"], ways: int) -> Int[Array, "X"]:
    """`total` in `ways` equal parts, piece by piece; the first get what is left."""
    part = jnp.arange(ways, dtype=total.dtype)[:, None]
    each = total // ways + (part < total % ways).astype(jnp.int32)
    return each.astype(total.dtype).reshape(-1)
