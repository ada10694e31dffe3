"""What is done in every layer of a cache that is compressed behind every chunk.

See `kvjax.compress.rolling`. Everything here is known before the data, but for how many
tokens rows have.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from kvjax.compress.config import Compression
from kvjax.compress.plan import Eviction, LayerPlan, recency
from kvjax.types import LayerSpec, Lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rolling:
    """What is done in a layer behind every chunk; static.

    Attributes:
        evict: what ranks the tokens held; None: all of them stay.
        slots: of a head; None: one for every token of the row.
    """

    evict: Eviction | None = None
    slots: int | None = None


def check_rolling(c: Compression) -> None:
    """A compression can be repeated behind every chunk.

    Raises:
        ValueError: it cannot; says which field is in the way.
    """
    if not c.prefill.causal:
        raise ValueError(
            f"chunks are read densely; got prefill={type(c.prefill).__name__}, whose "
            "pattern is that of a whole prompt. Set prefill=dense, or leave `chunks` "
            "out."
        )
    for plan in c.parts:
        _check_plan(plan)


def _check_plan(plan: LayerPlan) -> None:
    wrong = ""
    if not plan.store.plain:
        names = sorted({type(codec).__name__ for codec in plan.store.codecs})
        wrong = f"`store` must be plain; got {' and '.join(names)}"
    elif plan.changes:
        wrong = f"`read` must be all; got {type(plan.read).__name__}"
    elif plan.schedule.interval is not None:
        wrong = (
            "the end of a chunk is when they evict; got schedule every_tokens, which "
            "is another time: use after_prefill"
        )
    elif plan.evict is not None:
        wrong = _wrong_eviction(plan.evict)
    if wrong:
        raise ValueError(
            f"what is held between chunks is plain tokens in slots, and {wrong}. "
            "Change that, or leave `chunks` out."
        )


def _wrong_eviction(evict: Eviction) -> str:
    """What of an eviction cannot be repeated behind every chunk, in words."""
    budget, score = evict.budget, evict.score
    if budget.keep is not None:
        return (
            f"their number must not grow with the row; got evict.budget.keep="
            f"{budget.keep}: set evict.budget.slots in its stead, and no `keeps`"
        )
    if budget.per_head or budget.surveys:
        return (
            "every head of a layer has the same number of slots; got evict.budget="
            f"{type(budget).__name__}: use uniform or pyramid"
        )
    if not evict.unit.single or evict.unit.reuse > 1:
        return (
            f"they are single tokens; got evict.unit={type(evict.unit).__name__} with "
            f"reuse={evict.unit.reuse}: use token, with reuse 1"
        )
    if evict.values is not None:
        return "keys are held with their values; got evict.values: leave it out"
    if evict.merge is not None:
        name = type(evict.merge).__name__
        return f"they stay what they were; got evict.merge={name}: leave it out"
    if score.probes:
        return (
            f"evict.score={type(score).__name__} reads a whole prompt again: use a "
            "score of tokens as they come"
        )
    return ""


def rolling_of(
    c: Compression, specs: Sequence[LayerSpec], tokens: int, dtype: Any
) -> tuple[Rolling, ...]:
    """What is done in every layer with rows of `tokens`.

    A window drops what it can no longer see by itself. Layers that compute the same
    have the slots of the largest of them; what each may use says `counts_of`.
    """
    mine = [_own(c, specs, layer, tokens, dtype) for layer in range(len(specs))]
    most: dict[tuple[LayerSpec, Eviction | None], int] = {}
    for spec, one in zip(specs, mine, strict=True):
        alike = (spec.kind, one.evict)
        most[alike] = max(most.get(alike, 0), one.slots or 0)
    return tuple(
        dataclasses.replace(one, slots=most[spec.kind, one.evict] or None)
        for spec, one in zip(specs, mine, strict=True)
    )


def _own(
    c: Compression, specs: Sequence[LayerSpec], layer: int, tokens: int, dtype: Any
) -> Rolling:
    evict, window = c.at(layer, len(specs)).evict, specs[layer].window
    if evict is None:
        if window is None or window >= tokens:
            return Rolling()
        return Rolling(evict=recency(window), slots=window)
    slots = evict.budget.bounds(tuple(specs), _slot_bytes(c, specs, dtype))
    assert slots is not None  # `check_rolling` has refused shares of the row
    return Rolling(evict=evict, slots=min(slots[layer], tokens))


def _slot_bytes(c: Compression, specs: Sequence[LayerSpec], dtype: Any) -> float:
    return c.store.slot_bytes(specs[0].head_dim, jnp.dtype(dtype).itemsize)


def counts_of(
    c: Compression,
    specs: Sequence[LayerSpec],
    kinds: Sequence[Rolling],
    seen: Lengths,
    dtype: Any,
) -> Int[Array, "L B"]:
    """Tokens per head that every layer keeps once rows have `seen` tokens."""
    size, found = _slot_bytes(c, specs, dtype), []
    for layer, kind in enumerate(kinds):
        if kind.evict is None or kind.slots is None:
            found.append(seen)
        else:
            counts = kind.evict.budget.counts(seen, tuple(specs), size)[layer]
            found.append(jnp.minimum(counts, kind.slots))
    return jnp.stack([jnp.asarray(x, jnp.int32) for x in found])
