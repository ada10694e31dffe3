"""Cut arrays whose used size depends on the data, outside of `jit`."""

import dataclasses

from kvjax.cache import LayerCache, Slots
from kvjax.codecs import LowRankArray, needed_rank


def trim_group(group: LayerCache) -> LayerCache:
    """Low-rank parts cut to the rank that their rows and layers need."""
    parts = tuple(
        _trim(part) if isinstance(part, Slots) else part for part in group.parts
    )
    return dataclasses.replace(group, parts=parts)


def _trim(part: Slots) -> Slots:
    fields = {}
    for name in ("keys", "values"):
        held = getattr(part, name)
        if isinstance(held, LowRankArray):
            fields[name] = held.trim(needed_rank(held))
    return dataclasses.replace(part, **fields) if fields else part
