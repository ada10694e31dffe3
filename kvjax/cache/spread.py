"""Caches on a mesh: where every array of one lies, and a decode step on each device.

Shapes are annotated in one alphabet, so where an array lies follows from its type: `B`
is split like batches, `K` and `H` like KV heads, and the slots `S` of a `Slots` part
like slots. A step attends and writes under one `shard_map`: a device has its rows and
its heads, reads and writes nothing else, and runs the kernels of its chip.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from kvjax import axes
from kvjax.cache.apart import Apart
from kvjax.cache.by_shard import ByShard
from kvjax.cache.layer import LayerCache
from kvjax.cache.parts import AbstractPart, Slots
from kvjax.cache.ragged import Ragged
from kvjax.cache.shared import Shared
from kvjax.cache.state import KVCache
from kvjax.cache.tracking import Tracking
from kvjax.turns import Turn
from kvjax.types import LayerInputs, LayerSpec

ROWS, HEADS, SLOTS = frozenset({"batch"}), frozenset({"kv_heads"}), frozenset({"slots"})

_POSITIONS = ("", "B", "K", "S")

Axes = frozenset[str]
"""Logical axes that are split, of those that the rules are about."""


def axes_of(group: LayerCache, front: Sequence[Shared] = ()) -> Axes:
    """What a group of layers may be split along.

    Evicting while decoding ranks the tokens of each head by themselves in some scores
    alone; where it does not, or merges tokens, every device has all heads.
    """
    folding, (batch, kv_heads) = group.folding, group.tail.positions.shape[-3:-1]
    parts = [_of_one(part) for part in (*group.parts, *front)]
    pieces = {part.ways for part in parts if isinstance(part, ByShard)}
    if not pieces <= {head_ways(batch, kv_heads)}:
        return ROWS | SLOTS  # made for another mesh
    if folding is None:
        return ROWS | HEADS | SLOTS
    return ROWS | HEADS if folding.score.per_head and not folding.merge else ROWS


def slot_ways(batch: int, kv_heads: int) -> int:
    """Devices that share the slots of a body, which are to be a multiple of it."""
    return _ways(batch, kv_heads)[2]


def head_ways(batch: int, kv_heads: int) -> int:
    """Devices that share the KV heads of a row."""
    return _ways(batch, kv_heads)[1]


def _ways(batch: int, kv_heads: int) -> tuple[int, ...]:
    here = axes.mesh()
    if here is None:
        return 1, 1, 1
    found = axes.spec(("batch", "kv_heads", "slots"), (batch, kv_heads, 0))
    return tuple(axes.ways(names, here) for names in found)


def specs_of[T](tree: T, split: Axes) -> T:
    """Where the arrays of a cache, a part, or inputs lie: as `tree`, of specs."""
    leaves: list[PartitionSpec] = []
    _collect(tree, split, ("B", "K"), leaves)
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _collect(
    held: Any, split: Axes, lead: Sequence[str], out: list, block: int = 1
) -> None:
    """The specs of all leaves of `held`, in order; blocks of slots stay together."""
    if isinstance(held, LayerCache) and held.growth is not None:
        block = held.growth.block
    if isinstance(held, Tracking):
        layers = held.limit.ndim - 1
        for name, shape in (("body", lead), ("tail", lead), ("row", lead[:1])):
            for leaf in jax.tree.leaves(getattr(held, name)):
                out.append(axes.spec_of(leaf, [""] * layers + list(shape), split))
        out.append(axes.spec_of(held.limit, [""] * layers + ["B"], split))
        return
    if not dataclasses.is_dataclass(held):  # tuples of parts; numbers; None
        for item in held if isinstance(held, tuple) else jax.tree.leaves(held):
            if isinstance(held, tuple):
                _collect(item, split, lead, out, block)
            else:
                out.append(PartitionSpec())
        return
    if isinstance(held, ByShard):
        first = len(out)
        _collect(held.part, split, lead, out)
        rows = _rows_of(held, split)
        for at, leaf in enumerate(jax.tree.leaves(held.part), first):
            axis = leaf.ndim - 2 if leaf is held.part.offsets else 0
            out[at] = PartitionSpec(*[None] * axis, rows)
        return
    if isinstance(held, Ragged):
        lead = ("B",)
    whole = isinstance(held, AbstractPart) and not isinstance(held, Slots | Shared)
    if whole or (isinstance(held, Slots) and not _cut(held, split, block)):
        split = split - SLOTS
    for field in dataclasses.fields(held):
        value = getattr(held, field.name)
        if field.metadata.get("static") or value is None:
            continue
        if isinstance(value, jax.Array | jax.ShapeDtypeStruct):
            letters = axes.letters_of(field.type, value.ndim, lead)
            out.append(axes.spec_of(value, letters, split))
        else:
            _collect(value, split, lead, out, block)


def _cut(part: Slots, split: Axes, block: int) -> bool:
    """Whether devices get whole blocks of its slots, and whole groups of codes.

    What rows add behind a fork may be less than a block for each.
    """
    names = axes.spec_of(part.positions, _POSITIONS[-part.positions.ndim :], split)
    here = axes.mesh()
    if here is None or not names[-1]:
        return False
    unit = math.lcm(block, part.keys.block_multiple, part.values.block_multiple)
    return part.positions.shape[-1] % (unit * axes.ways(names[-1], here)) == 0


def _rows_of(part: ByShard, split: Axes) -> axes.MeshAxes:
    """What splits rows that are pieces of heads, and of each the rows."""
    rows, ways = part.positions.shape[0] // part.ways, part.ways
    among = [axis if axis in split else None for axis in ("batch", "kv_heads")]
    names = [axes.names_of(x) for x in axes.spec(among, (rows, ways))]
    here = axes.mesh()
    if here is not None and axes.ways(names[1], here) != ways:
        names[1] = ()
    return (*names[1], *names[0]) or None


def laid_out(cache: KVCache) -> KVCache:
    """`cache` split over the mesh that this trace is for, if there is one."""
    if axes.mesh() is None:
        return cache
    return dataclasses.replace(cache, groups=tuple(map(_placed, cache.groups)))


def _placed(group: LayerCache) -> LayerCache:
    check_slots(group)
    where = specs_of(group, axes_of(group))
    return jax.tree.map(jax.lax.with_sharding_constraint, group, where)


def share(cache: KVCache) -> KVCache:
    """What one device of the mesh holds of `cache`, as shapes; all, without a mesh."""
    here = axes.mesh()
    if here is None:
        return cache

    def held(x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            NamedSharding(here, spec).shard_shape(x.shape), x.dtype
        )

    groups = [jax.tree.map(held, g, specs_of(g, axes_of(g))) for g in cache.groups]
    return dataclasses.replace(cache, groups=tuple(groups))


def check_slots(group: LayerCache) -> None:
    """Slots are split of bodies that can be, if the rules split any.

    Raises:
        ValueError: they cannot.
    """
    batch, kv_heads = group.tail.positions.shape[-3:-1]
    ways = slot_ways(batch, kv_heads)
    others = [part for part in group.own.parts if not isinstance(part, Slots)]
    if ways == 1 or not (group.folding or others):
        return
    what = "one that later tokens evict from"
    if others:
        what = f"one with {type(others[0]).__name__} parts"
    raise ValueError(
        f"the rules split `slots` over {ways} devices, and this compression holds a "
        f"body that cannot be: {what}. Only bodies with one capacity for all heads "
        "(`Slots`) that every step reads as a whole can. Split batches or heads "
        "(rules | {'slots': None}), or use another compression."
    )


def attend(
    group: LayerCache,
    inputs: LayerInputs,
    turn: Turn = None,
    front: Sequence[Shared] = (),
) -> tuple[Array, LayerCache]:
    """`group.attend`, by every device of the mesh for its rows and heads."""
    mesh = axes.mesh()
    if mesh is None:
        return group.attend(inputs, turn, front)
    split = axes_of(group, front)
    rows, heads, *_ = axes.spec_of(inputs.k, "BKTD", split)
    split = split if heads else split - HEADS  # query heads go with KV heads
    # A prefix of one row may be split along slots by what splits the rows.
    beside = split if not _slots(front, split, rows) else split - SLOTS
    where = (
        specs_of(group, split),
        specs_of(inputs, split),
        None if turn is None else PartitionSpec(),
        specs_of(tuple(front), beside),
    )

    def mine(group: LayerCache, inputs: LayerInputs, turn: Turn, front: Any):
        spec, ways = group.spec, axes.ways(heads, mesh)
        local = dataclasses.replace(
            spec,
            num_heads=spec.num_heads // ways,
            num_kv_heads=spec.num_kv_heads // ways,
        )
        pieces = [_Piece(local, heads, along[-1]) for along in bodies]
        parts = tuple(map(_Piece.of, pieces, group.parts))
        own = dataclasses.replace(group, parts=parts, spec=local)
        pieces = [_Piece(local, heads, along[-1]) for along in fronts]
        inputs = dataclasses.replace(inputs, spec=local)
        out, after = own.attend(inputs, turn, tuple(map(_Piece.of, pieces, front)))
        parts = tuple(map(_restored, group.parts, after.parts))
        return out, dataclasses.replace(after, parts=parts, spec=spec)

    # Specs, where arrays are in a cache.
    bodies: list[Any] = [one.positions for one in where[0].parts]
    fronts: list[Any] = [_of_one(one).positions for one in where[3]]
    mapped = jax.shard_map(
        mine,
        mesh=mesh,
        in_specs=where,
        out_specs=(axes.spec_of(inputs.q, "BHTD", split), where[0]),
        check_vma=False,
    )
    return mapped(group, inputs, turn, tuple(front))


def _of_one(part: AbstractPart) -> AbstractPart:
    return part.part if isinstance(part, Shared) else part


def _slots(front: Sequence[Shared], split: Axes, rows: axes.MeshAxes) -> bool:
    """Whether what splits the rows splits slots of what is in front of them."""
    found: list[Any] = [
        _of_one(one).positions[-1] for one in specs_of(tuple(front), split)
    ]
    mine = set(axes.names_of(rows))
    return any(mine & set(axes.names_of(names)) for names in found)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What a device has of a part.

    Attributes:
        spec: of its heads.
        heads, slots: axes of the mesh that split them.
    """

    spec: LayerSpec
    heads: axes.MeshAxes
    slots: axes.MeshAxes

    def of(self, part: AbstractPart) -> Any:
        """`part` as it attends and grows by itself."""
        if isinstance(part, Shared):
            return dataclasses.replace(part, part=self.of(part.part))
        if isinstance(part, ByShard) and self.heads:
            return part.part  # of its rows and heads
        if isinstance(part, Slots) and self.slots:
            return Apart(part=part, names=axes.names_of(self.slots))
        if isinstance(part, Ragged) and self.heads:
            # All of the buffer is here; of its heads the device reads its own.
            own = self.spec.num_kv_heads
            first = jax.lax.axis_index(axes.names_of(self.heads)) * own
            edges = jax.lax.dynamic_slice_in_dim(part.offsets, first, own + 1, axis=-1)
            return dataclasses.replace(part, offsets=edges)
        return part


def _restored(before: AbstractPart, after: AbstractPart) -> AbstractPart:
    """A part as the cache has it, which nobody writes to where it is ragged."""
    if isinstance(before, Ragged | ByShard):
        return before
    return after.part if isinstance(after, Apart) else after
