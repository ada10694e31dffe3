"""Which logical axes of arrays are split over which axes of a mesh, in a trace.

Two things are known while a program is traced: its mesh (`jax.sharding`'s own abstract
mesh) and the rules, from logical axes to axes of the mesh. Both are part of what JAX
keeps programs by, so one that was traced for other rules is not run again. Without
rules, without a mesh, and inside of `shard_map` nothing is split here.
"""

import contextlib
import math
import typing
from collections.abc import Iterator, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

MeshAxes = str | tuple[str, ...] | None
Rules = Mapping[str, MeshAxes]
"""Logical axis to the axis, or axes, of a mesh that split it; None: whole."""

Pairs = tuple[tuple[str, MeshAxes], ...]
"""Rules that can be hashed."""

LOGICAL: Mapping[str, str] = MappingProxyType(
    {
        "B": "batch",
        "K": "kv_heads",
        "H": "kv_heads",
        "Hx": "kv_heads",  # a list of blocks for each head, or one for all
        "S": "slots",
        "A": "slots",  # in groups of codes
    }
)
"""What letters of the alphabet stand for, of those that may be split.

Query heads go with the KV heads that they read.
"""

_RULES = jax.make_user_context(default_value=())


def names_of(axes: MeshAxes) -> tuple[str, ...]:
    """Mesh axes, one by one."""
    return (axes,) if isinstance(axes, str) else axes or ()


@contextlib.contextmanager
def split(mesh: AbstractMesh, rules: Pairs) -> Iterator[None]:
    """Programs that are traced meanwhile are for this mesh, split by these rules.

    Inside of `shard_map` the mesh stays the one that is being mapped over.
    """
    here = jax.sharding.get_abstract_mesh()
    mapped = AxisType.Manual in here.axis_types
    where = contextlib.nullcontext() if mapped else jax.sharding.use_abstract_mesh(mesh)
    with where, _RULES(rules):
        yield


def mesh() -> AbstractMesh | None:
    """The mesh that this trace is split over by rules.

    None: there is none, or one of a single device, or no rules.
    """
    here = jax.sharding.get_abstract_mesh()
    if not _RULES.value or set(here.axis_types) != {AxisType.Auto} or here.size == 1:
        return None
    return here


def rule(axis: str) -> MeshAxes:
    """What splits a logical axis in this trace; None: nothing, or there is no mesh."""
    return None if mesh() is None else dict(_RULES.value).get(axis)


def ways(axes: MeshAxes, mesh: Any) -> int:
    """Devices that these axes of a mesh have together."""
    return math.prod(mesh.shape[name] for name in names_of(axes))


def spec(axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """Where an array of these logical axes lies.

    An axis whose size its mesh axes do not divide is whole everywhere, and so is one
    that an earlier axis of the array has taken the mesh axis of.
    """
    here = mesh()
    if here is None:
        return PartitionSpec()
    rules, taken, found = dict(_RULES.value), set(), []
    for axis, size in zip(axes, shape, strict=True):
        names = names_of(rules.get(axis) if axis else None)
        fits = set(names) <= set(here.axis_names) and not taken & set(names)
        if not names or not fits or size % ways(names, here):
            found.append(None)
            continue
        taken |= set(names)
        found.append(names[0] if len(names) == 1 else names)
    return PartitionSpec(*found)


def letters_of(annotation: Any, rank: int, lead: Sequence[str] = ()) -> list[str]:
    """The letters of an array's axes, by its annotation.

    Args:
        annotation: of a field, `Float[Array, "*lead S D"]` or several with `|`.
        rank: of the array; where it has more axes, those in front are the layers: "".
        lead: what `*lead` stands for.
    """
    found: list[str] = []
    for kind in typing.get_args(annotation) or (annotation,):
        # What an encoded array holds has no letters where any codec may hold it.
        words = getattr(kind, "dim_str", "" if kind is type(None) else "*lead S D")
        letters: list[str] = []
        for word in words.split():
            letters += lead if word == "*lead" else [word] * (word != "*layers")
        if len(found) < len(letters) <= rank:
            found = letters
    return [""] * (rank - len(found)) + found


def spec_of(x: Any, letters: Sequence[str], among: Set[str]) -> PartitionSpec:
    """Where an array lies, by the letters of its first axes.

    Args:
        x: anything with a shape.
        letters: of the first axes; the others are whole.
        among: logical axes that may be split here.
    """
    logical = [LOGICAL.get(letter) for letter in letters]
    logical = [axis if axis in among else None for axis in logical]
    return spec([*logical, *[None] * (len(x.shape) - len(logical))], x.shape)


def laid_out(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """`x` split by its logical axes; as it is, where nothing is split."""
    if mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape))


def as_numpy(x: Any) -> np.ndarray:
    """The numbers of an array, whichever process holds them; outside of `jit`."""
    if isinstance(x, jax.Array) and not (
        x.is_fully_addressable or x.is_fully_replicated
    ):
        where = jax.sharding.NamedSharding(x.sharding.mesh, PartitionSpec())  # type: ignore[attr-defined]
        x = jax.jit(lambda x: x, out_shardings=where)(x)
    return np.asarray(x)
