"""Between looking at a prompt and keeping some of it: who gets how much.

One place sees all layers. It turns budgets into slots at the rows' lengths, exactly,
and says which layers of a model a compression treats alike.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kvjax.budgets import Uniform
from kvjax.compress.config import RANKED, Compression, Eviction, recency
from kvjax.depth import Depth
from kvjax.schedules import EveryTokens
from kvjax.turns import take
from kvjax.types import LayerSpec, Lengths, pytree, static


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How a compression builds the cache of a layer; static.

    Attributes:
        evict: what is dropped, or None.
        page: slots of a page, where steps read some pages only; None: all is read.
        block: tokens that move into the body together; 0: later tokens stay plain.
        slots: of a head, for the longest rows; of all heads together where they share.
        full: of a head, with a value.
        bare: of a head, without one.
        pooled: whether layers of this kind share one buffer: those whose heads do, and
            those that differ in `slots`, which is then their largest.
    """

    evict: Eviction | None
    page: int | None
    block: int
    slots: int
    full: int
    bare: int = 0
    pooled: bool = False


@pytree
class Share:
    """What a layer gets of every row; of all layers, with a first axis `L`.

    Attributes:
        counts: tokens per head that the budget gives.
        held: slots per head that these need: whole chunks may need more, or fewer.
        full: tokens per head that keep their value.
        leads: whether the layer chooses by scores of its own, None: all do.
        sure: slots that each head surely gets where heads share, else None.
        total: slots of all heads together where they share, else None.
    """

    counts: Int[Array, "*layers B"]
    held: Int[Array, "*layers B"]
    full: Int[Array, "*layers B"]
    leads: Bool[Array, "*layers"] | None = None
    sure: Int[Array, "*layers B K"] | None = None
    total: Int[Array, "*layers B"] | None = None


@pytree
class Survey:
    """What all layers get.

    Attributes:
        share: at the rows' lengths.
        layouts: of every layer; layers of equal ones are treated alike.
        slots: `Layout.slots` of every layer by itself.
    """

    share: Share
    layouts: tuple[Layout, ...] = static()
    slots: tuple[int, ...] = static()

    def of(self, depth: Depth) -> Share:
        """What one layer gets."""
        return take(self.share, jnp.asarray(depth.layer))


def eviction_of(c: Compression, spec: LayerSpec, tokens: int) -> Eviction | None:
    """The layer's eviction; a window drops what it can no longer see by itself."""
    if c.evict is None and spec.window is not None and spec.window < tokens:
        return recency(spec.window)
    return c.evict


def evictions_of(
    c: Compression, specs: Sequence[LayerSpec], tokens: int
) -> tuple[Eviction | None, ...]:
    """What each layer drops of a prompt of `tokens`."""
    return tuple(eviction_of(c, spec, tokens) for spec in specs)


def survey(
    c: Compression,
    specs: tuple[LayerSpec, ...],
    lengths: Lengths,
    tokens: int,
    dtype: jnp.dtype,
) -> Survey:
    """What each layer gets of rows of `lengths`, none longer than `tokens`.

    Args:
        c: what is done.
        specs: all layers.
        lengths: tokens of each row.
        tokens: width of the prompt.
        dtype: of keys and values, for budgets in bytes.
    """
    share, slots, full = _budgets(c, specs, lengths, tokens, dtype)
    layouts = []
    for layer, evict in enumerate(evictions_of(c, specs, tokens)):
        layouts.append(
            Layout(
                evict=evict,
                page=c.read.page_of(layer),
                block=c.block(layer),
                slots=slots[layer],
                full=full[layer],
                bare=_bare(evict, slots[layer], full[layer]),
            )
        )
    return Survey(share=share, layouts=_pooled(c, specs, layouts), slots=slots)


def _budgets(c, specs, lengths, tokens, dtype) -> tuple[Share, tuple, tuple]:
    """Of all layers: what rows get, slots of the longest, those with a value."""
    if c.evict is None:
        seen = [min(spec.window or tokens, tokens) for spec in specs]
        counts = jnp.minimum(lengths, jnp.asarray(seen, jnp.int32)[:, None])
        return Share(counts=counts, held=counts, full=counts), tuple(seen), tuple(seen)
    budget, unit = c.evict.budget, c.evict.unit
    size = slot_bytes(c, specs[0].head_dim, dtype)
    counts = budget.counts(lengths, specs, size)
    share = Share(counts=counts, held=unit.slots(counts, lengths), full=counts)
    if unit.reuse > 1:
        leads = jnp.arange(len(specs)) % unit.reuse == 0
        share = dataclasses.replace(share, leads=leads)
    slots = unit.capacities(budget, tokens, specs, size)
    if budget.per_head:
        sure, total = budget.split(share.held, lengths, specs)
        share = dataclasses.replace(share, sure=sure, total=total)
        slots = budget.flat_capacities(slots, tokens, specs)
        return share, slots, slots
    if isinstance(c.schedule, EveryTokens):
        # A short prompt's body grows up to what any row may hold.
        bounds = budget.bounds(specs, size)
        return share, bounds or slots, bounds or slots
    if c.evict.values is None:
        return share, slots, slots
    full = c.evict.values.counts(lengths, specs, size)
    most = c.evict.values.capacities(tokens, specs, size)
    share = dataclasses.replace(share, counts=jnp.maximum(counts, full), full=full)
    return share, tuple(map(max, slots, most)), most


def _bare(evict: Eviction | None, slots: int, full: int) -> int:
    """Slots that do for the keys of any row whose values are dropped."""
    if evict is None or evict.values is None:
        return 0
    if isinstance(evict.budget, Uniform) and isinstance(evict.values, Uniform):
        # Both are rounded up, so a shorter row may have one more.
        return min(slots, slots - full + (evict.budget.keep is not None))
    return slots


def slot_bytes(c: Compression, head_dim: int, dtype: jnp.dtype) -> float:
    """Bytes of one slot of one head, its position included."""
    size = jnp.dtype(dtype).itemsize
    codecs = (c.store.keys, c.store.values)
    return 4 + sum(codec.slot_bytes(head_dim, size) for codec in codecs)


def _pooled(
    c: Compression, specs: tuple[LayerSpec, ...], layouts: list[Layout]
) -> tuple[Layout, ...]:
    """Layouts of layers that may share a buffer, with the largest number of slots."""
    most: dict[tuple[LayerSpec, Layout], list[int]] = {}
    for spec, layout in zip(specs, layouts, strict=True):
        most.setdefault((spec.kind, _sizeless(layout)), []).append(layout.slots)

    def together(spec: LayerSpec, layout: Layout) -> Layout:
        slots = most[spec.kind, _sizeless(layout)]
        heads = layout.evict is not None and layout.evict.budget.per_head
        if not heads and (not _poolable(c, layout) or min(slots) == max(slots)):
            return layout
        return dataclasses.replace(
            layout, slots=max(slots), full=max(slots), pooled=True
        )

    return tuple(map(together, specs, layouts))


def _sizeless(layout: Layout) -> Layout:
    return dataclasses.replace(layout, slots=0, full=0, bare=0)


def _poolable(c: Compression, layout: Layout) -> bool:
    """Whether the body is one of tokens with their value that never changes."""
    fixed = not layout.block and not isinstance(c.schedule, EveryTokens)
    ranked = any(isinstance(x, RANKED) for x in (c.store.keys, c.store.values))
    split = layout.evict is not None and layout.evict.values is not None
    return fixed and not ranked and not split
