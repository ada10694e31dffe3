"""A body whose slots lie on several devices: each attends to its own, all merge."""

import dataclasses
from typing import final

import jax
import jax.numpy as jnp

from kvjax.cache.parts import AbstractPart, Slots
from kvjax.pallas_kernels.partial import Partial, merge
from kvjax.turns import put, take
from kvjax.types import NEG_INF, pytree, static


@final
@pytree
class Apart(AbstractPart):
    """This device's share of the slots of a body; exists inside of `shard_map` alone.

    What devices find of their slots is merged by log-sum-exp, each finishing its share
    of the query heads: two collectives, of a number of bytes that does not grow with
    the slots. A device may hold none of a row's tokens.

    Attributes:
        part: the slots of this device; `filled` counts those of all devices.
        names: axes of the mesh that split them.
    """

    part: Slots
    names: tuple[str, ...] = static()

    @property
    def positions(self):  # type: ignore[override]
        """Of this device's slots."""
        return self.part.positions

    def attend(self, q, q_positions, spec, limit=None, turn=None):
        assert limit is None  # the parallel form has no mesh of its own
        return across(self.part.attend(q, q_positions, spec, None, turn), self.names)

    def live_positions(self, turn=None):
        raise AssertionError("inside of a program nobody looks")

    def grow(self, tail, rows, growth, spec, turn=None):
        assert self.part.filled is not None
        slots = self.part.positions.shape[-1]
        first = jax.lax.axis_index(self.names) * slots
        filled = take(self.part.filled, turn)
        # A block lies on one device as a whole: capacities see to it.
        mine = rows & (filled >= first) & (filled < first + slots)
        local = jnp.clip(self.part.filled - first, 0, slots)
        grown = dataclasses.replace(self.part, filled=local)
        grown = grown.grow(tail, mine, growth, spec, turn)
        after = filled + jnp.where(rows, growth.block, 0)
        grown = dataclasses.replace(grown, filled=put(self.part.filled, after, turn))
        return dataclasses.replace(self, part=grown)


def across(part: Partial, names: tuple[str, ...]) -> Partial:
    """Attention over the keys of all devices, of what each has found of its own.

    Every device gets the partial results of its share of the queries (`all_to_all`, a
    share of what `all_gather` would bring), merges them, and hands them out.
    """
    ways = jax.lax.axis_size(names)
    b, h, t, d = part.out.shape
    packed = jnp.concatenate([part.out, part.lse[..., None]], axis=-1)
    packed = packed.reshape(b, h * t, d + 1)
    short = -(h * t) % ways
    packed = jnp.pad(packed, [(0, 0), (0, short), (0, 0)], constant_values=NEG_INF)
    packed = packed.reshape(b, ways, -1, d + 1)
    share = jax.lax.all_to_all(packed, names, split_axis=1, concat_axis=0)
    found = [Partial(one[..., :-1], one[..., -1]) for one in share]
    done = merge([_cleared(one) for one in found])
    packed = jnp.concatenate([done.out, done.lse[..., None]], axis=-1)
    packed = jax.lax.all_gather(packed, names, axis=1, tiled=True)
    packed = packed[:, : h * t].reshape(b, h, t, d + 1)
    return Partial(packed[..., :-1], packed[..., -1])


def _cleared(part: Partial) -> Partial:
    """Zeros where nothing was seen, whatever stands there."""
    seen = ~jnp.isneginf(part.lse)
    return Partial(jnp.where(seen[..., None], part.out, 0.0), part.lse)
