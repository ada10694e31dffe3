"""Between looking at a prompt and keeping some of it: who gets how much.

One place sees all layers. It turns budgets into slots at the rows' lengths, exactly,
and says which layers of a model a compression treats alike. What budgets want to know
of all layers' data comes to it through `allotted`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from kvjax.compress.config import Compression
from kvjax.compress.eviction import Eviction, recency
from kvjax.compress.plan import LayerPlan
from kvjax.depth import Depth
from kvjax.turns import take
from kvjax.types import LayerSpec, Lengths, Scores, pytree, static


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How a compression builds the cache of a layer; static.

    Attributes:
        plan: what is done; a window is an eviction, too.
        slots: of a head, for the longest rows; of all heads together where they share.
        full: of a head, with a value.
        bare: of a head, without one.
        pooled: whether layers of this kind share one buffer: those whose heads do, and
            those that differ in `slots`, which is then their largest.
    """

    plan: LayerPlan
    slots: int
    full: int
    bare: int = 0
    pooled: bool = False

    @property
    def shared(self) -> bool:
        """Whether the heads of a layer share its slots."""
        return self.plan.evict is not None and self.plan.evict.budget.per_head


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
        heads: slots of each head where all layers share, else None.
    """

    counts: Int[Array, "*layers B"]
    held: Int[Array, "*layers B"]
    full: Int[Array, "*layers B"]
    leads: Bool[Array, "*layers"] | None = None
    sure: Int[Array, "*layers B K"] | None = None
    total: Int[Array, "*layers B"] | None = None
    heads: Int[Array, "*layers B K"] | None = None


@pytree
class Survey:
    """What all layers get.

    Attributes:
        share: at the rows' lengths.
        layouts: of every layer; layers of equal ones are treated alike.
        slots: `Layout.slots` of every layer by itself.
        scores: `[L, B, K, S]` in the layers where a probe ranks, or None.
    """

    share: Share
    scores: Scores | None = None
    layouts: tuple[Layout, ...] = static()
    slots: tuple[int, ...] = static()

    def of(self, depth: Depth) -> Share:
        """What one layer gets."""
        return take(self.share, jnp.asarray(depth.layer))


def plans_of(
    c: Compression, specs: Sequence[LayerSpec], tokens: int
) -> tuple[LayerPlan, ...]:
    """What is done in each layer with a prompt of `tokens`.

    A window drops what it can no longer see by itself.
    """

    def plan(layer: int, spec: LayerSpec) -> LayerPlan:
        given = c.at(layer, len(specs))
        if given.evict is None and spec.window is not None and spec.window < tokens:
            return dataclasses.replace(given, evict=recency(spec.window))
        return given

    return tuple(plan(layer, spec) for layer, spec in enumerate(specs))


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
    plans = plans_of(c, specs, tokens)
    wide = jnp.dtype(dtype).itemsize
    head_dim = specs[0].head_dim
    sizes = [plan.store.slot_bytes(head_dim, wide) for plan in plans]
    size = sum(sizes) / len(sizes)
    # Layers under the windows of their own keep what these let them see.
    asked = [c.at(layer, len(specs)).evict for layer in range(len(specs))]
    found = {
        evict: _budgets(evict, c, specs, lengths, tokens, size)
        for evict in dict.fromkeys(asked)
    }
    layouts, slots = [], []
    for layer, (plan, evict) in enumerate(zip(plans, asked, strict=True)):
        _, most, held, full = found[evict]
        slots.append(held[layer])
        layouts.append(
            Layout(
                plan=plan,
                slots=most[layer],
                full=full[layer],
                bare=_bare(plan.evict, most[layer], full[layer]),
            )
        )
    share = _each_its_own(asked, {evict: one[0] for evict, one in found.items()})
    return Survey(share=share, layouts=_pooled(specs, layouts), slots=tuple(slots))


def _each_its_own(
    asked: Sequence[Eviction | None], shares: dict[Eviction | None, Share]
) -> Share:
    """Of every layer what its own budget gives it."""
    if len(shares) == 1:
        return next(iter(shares.values()))

    def rows(name: str) -> Array | None:
        given = {evict: getattr(share, name) for evict, share in shares.items()}
        known = [x for x in given.values() if x is not None]
        if not known:
            return None
        blank = jnp.ones if name == "leads" else jnp.zeros
        blank = blank(known[0].shape[1:], known[0].dtype)
        return jnp.stack(
            [
                blank if given[evict] is None else given[evict][layer]
                for layer, evict in enumerate(asked)
            ]
        )

    names = [field.name for field in dataclasses.fields(Share)]
    return Share(**{name: rows(name) for name in names})  # type: ignore[arg-type]


def _budgets(
    evict: Eviction | None,
    c: Compression,
    specs: tuple[LayerSpec, ...],
    lengths: Lengths,
    tokens: int,
    size: float,
) -> tuple[Share, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """If all layers were under one budget: what rows get, and slots of the longest.

    Slots of a layer that do, slots that it counts for in a buffer, those with a value.
    """
    if evict is None:
        seen = [min(spec.window or tokens, tokens) for spec in specs]
        counts = jnp.minimum(lengths, jnp.asarray(seen, jnp.int32)[:, None])
        most = tuple(seen)
        return Share(counts=counts, held=counts, full=counts), most, most, most
    budget, unit = evict.budget, evict.unit
    counts, protected = budget.counts(lengths, specs, size), evict.score.protected
    slots = unit.slots(counts, lengths, protected)
    share = Share(counts=counts, held=slots, full=counts)
    if unit.reuse > 1:
        leads = jnp.arange(len(specs)) % unit.reuse == 0
        share = dataclasses.replace(share, leads=leads)
    slots = unit.capacities(budget, tokens, specs, size, protected)
    if budget.surveys:
        heads = specs[0].num_kv_heads
        most = tuple(heads * budget.most_of(n, tokens) for n in slots)
        # Until the data are known, all heads get the same.
        each = jnp.broadcast_to(share.held[..., None], (*share.held.shape, heads))
        share = dataclasses.replace(share, heads=each)
        return share, most, tuple(heads * n for n in slots), most
    if budget.per_head:
        sure, total = budget.split(share.held, lengths, specs)
        share = dataclasses.replace(share, sure=sure, total=total)
        slots = budget.flat_capacities(slots, tokens, specs)
        return share, slots, slots, slots
    if c.schedule.interval is not None:
        # A short prompt's body grows up to what any row may hold.
        slots = budget.bounds(specs, size) or slots
        return share, slots, slots, slots
    if evict.values is None:
        return share, slots, slots, slots
    full = evict.values.counts(lengths, specs, size)
    most = evict.values.capacities(tokens, specs, size)
    share = dataclasses.replace(share, counts=jnp.maximum(counts, full), full=full)
    slots = tuple(map(max, slots, most))
    return share, slots, slots, most


def _bare(evict: Eviction | None, slots: int, full: int) -> int:
    """Slots that do for the keys of any row whose values are dropped."""
    if evict is None or evict.values is None:
        return 0
    if evict.budget.even and evict.values.even:
        # Both are rounded up, so a shorter row may have one more.
        return min(slots, slots - full + (evict.budget.keep is not None))
    return slots


def allotted(
    found: Survey,
    groups: Sequence[range],
    seen: Sequence[Any],
    lengths: Lengths,
    specs: tuple[LayerSpec, ...],
) -> Survey:
    """`found` once the data of all layers are known.

    Args:
        found: by lengths alone.
        groups: layers that lie in one buffer (`kvjax.depth.members`). They share what
            is theirs by lengths, and no more: how long a buffer is may not depend on
            data.
        seen: of each group whose budget surveys, with a first axis for its layers, the
            priorities of all prompt tokens and what the budget has found
            (`Observed.look`).
        lengths: tokens of each row.
        specs: all layers.
    """
    share = found.share
    for group, given in zip(groups, seen, strict=True):
        evict = found.layouts[group.start].plan.evict
        if evict is None or not evict.budget.surveys:
            continue
        mine, here = np.array(group), tuple(specs[layer] for layer in group)
        scores, look = given
        heads = evict.budget.allot(scores, look, share.held[mine], lengths, here)
        assert share.heads is not None
        share = dataclasses.replace(share, heads=share.heads.at[mine].set(heads))
    return dataclasses.replace(found, share=share)


def _pooled(specs: tuple[LayerSpec, ...], layouts: list[Layout]) -> tuple[Layout, ...]:
    """Layouts of layers that may share a buffer, with the largest number of slots."""
    most: dict[tuple[LayerSpec, Layout], list[int]] = {}
    for spec, layout in zip(specs, layouts, strict=True):
        most.setdefault((spec.kind, _sizeless(layout)), []).append(layout.slots)

    def together(spec: LayerSpec, layout: Layout) -> Layout:
        slots = most[spec.kind, _sizeless(layout)]
        if not layout.shared and (
            not _poolable(layout.plan) or min(slots) == max(slots)
        ):
            return layout
        return dataclasses.replace(
            layout, slots=max(slots), full=max(slots), pooled=True
        )

    return tuple(map(together, specs, layouts))


def _sizeless(layout: Layout) -> Layout:
    return dataclasses.replace(layout, slots=0, full=0, bare=0)


def _poolable(plan: LayerPlan) -> bool:
    """Whether the body is one of tokens with their value that never changes."""
    fixed = not plan.changes and plan.schedule.interval is None
    split = plan.evict is not None and plan.evict.values is not None
    return fixed and plan.store.flat and not split
