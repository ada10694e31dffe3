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

    @property
    def total(self) -> int:
        """Bytes of the cache on the device."""
        held = self.codes + self.scales + self.positions
        return held + self.tail + self.statistics - self.host


def held_of(cache: KVCache) -> Held:
    """The bytes of a cache, whose arrays may be shapes."""
    # Lengths and digests of the tokens say where one is.
    found = {"codes": 0, "scales": 0, "positions": nbytes((cache.length, cache.digest))}
    tail = statistics = read = 0
    upper, kinds = False, []
    for group, numbers in zip(cache.groups, members(cache.loops), strict=True):
        tail += nbytes(group.tail)
        statistics += nbytes(group.tracking)
        read += nbytes((group.tail, group.tracking))
        slots = 0
        for part in group.parts:
            for name, size in _of_part(part).items():
                found[name] += size
            upper |= any(one.settles for one in _encoded(part))
            read += part.read_bytes
            slots += part.positions.size
        heads, rows = group.spec.num_kv_heads, cache.length.shape[0]
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
        if isinstance(held, AbstractEncoded):
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
    return [one for one in held if isinstance(one, AbstractEncoded)]
