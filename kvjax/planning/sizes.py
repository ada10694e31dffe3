"""Bytes of a model and of its cache by what they are, out of the library's shapes."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from kvjax.cache import KVCache, host_nbytes
from kvjax.cache.parts import AbstractPart
from kvjax.codecs import AbstractEncoded
from kvjax.depth import members
from kvjax.planning.record import Layers
from kvjax.types import nbytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes of a cache, and what a decode step reads of it at most.

    Attributes:
        codes, scales, positions, tail, statistics: see `planning.record.Row`.
        host: of codes and scales, those in the host's memory.
        read: of a decode step.
        upper: whether it may be cut further, by data.
        between: of a prompt in chunks, what is held from one to the next.
        closing: of such a prompt, all that is held while the cache is made of it.
        layers: kinds of layers, in the order in which they come.
    """

    codes: int
    scales: int
    positions: int
    tail: int
    statistics: int
    host: int
    read: int
    upper: bool
    layers: tuple[Layers, ...]
    between: int = 0
    closing: int = 0

    @property
    def total(self) -> int:
        """Bytes of the cache on the device."""
        held = self.codes + self.scales + self.positions
        return held + self.tail + self.statistics - self.host

    def times(self, share: float) -> "Held":
        """About what a cache would have that is `share` of this one."""
        counts = {
            field.name: int(getattr(self, field.name) * share)
            for field in dataclasses.fields(self)
            if field.type is int
        }
        return dataclasses.replace(self, **counts)


def held_of(whole: KVCache, cache: KVCache) -> Held:
    """The bytes of a cache, whose arrays may be shapes.

    Args:
        whole: the cache, of which layers say how many slots they have.
        cache: what one chip holds of it.
    """
    # Lengths and digests of the tokens say where one is.
    found = {"codes": 0, "scales": 0, "positions": nbytes((cache.length, cache.digest))}
    tail = statistics = read = 0
    upper, kinds = False, []
    every = zip(whole.groups, cache.groups, members(cache.loops), strict=True)
    for all_of_it, group, numbers in every:
        tail += nbytes(group.tail)
        statistics += nbytes(group.tracking)
        read += nbytes((group.tail, group.tracking))
        for part in group.parts:
            for name, size in _of_part(part).items():
                found[name] += size
            upper |= any(one.settles for one in _encoded(part))
            read += part.read_bytes
        slots = sum(part.positions.size for part in all_of_it.parts)
        heads, rows = group.spec.num_kv_heads, whole.length.shape[0]
        kinds.append(
            Layers(
                count=len(numbers),
                slots=round(slots / (len(numbers) * rows * heads)),
                tail=group.tail.capacity,
                pooled=any(part.positions.ndim == 2 for part in group.parts),
            )
        )
    return Held(
        **found,
        tail=tail,
        statistics=statistics,
        host=host_nbytes(cache),
        read=read,
        upper=upper,
        layers=tuple(kinds),
    )


def _of_part(part: AbstractPart) -> dict[str, int]:
    """Codes, what decodes them, and integers that say where tokens are."""
    found = {"codes": 0, "scales": 0, "positions": 0}
    for field in dataclasses.fields(part):  # type: ignore[arg-type]
        held: Any = getattr(part, field.name)
        if field.metadata.get("static") or held is None:
            continue
        if isinstance(held, AbstractPart):  # in the pieces of several chips
            found = {name: found[name] + n for name, n in _of_part(held).items()}
        elif isinstance(held, AbstractEncoded):
            codes, side = held.apart
            found["codes"] += nbytes(codes)
            found["scales"] += nbytes(side)
        elif jnp.issubdtype(held.dtype, jnp.integer):
            found["positions"] += nbytes(held)
        else:  # bounds of pages, means of what was dropped
            found["scales"] += nbytes(held)
    return found


def _encoded(part: AbstractPart) -> list[AbstractEncoded]:
    held = [getattr(part, field.name) for field in dataclasses.fields(part)]  # type: ignore[arg-type]
    within = [x for one in held if isinstance(one, AbstractPart) for x in _encoded(one)]
    return [one for one in held if isinstance(one, AbstractEncoded)] + within
