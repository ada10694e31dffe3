"""Models whose weights lie on a mesh: what runs on them is traced for that mesh.

Every entry point is made by `entry`. Programs inside then know what they are split
over: batches, heads and caches are placed by one table (`models.sharding`), and ops
choose their kernels by the chip of the mesh.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.core
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from kvjax import axes
from kvjax.models.sharding import (
    RULES,
    TRAINING,
    automatic,
    check_heads,
    parameter_sharding,
    place,
)
from kvjax.narrow import narrow


@dataclasses.dataclass(frozen=True)
class Placement:
    """What a model is spread over.

    Attributes:
        mesh: all of whose axes are left to the partitioner.
        rules: logical axes to axes of the mesh.
    """

    mesh: AbstractMesh
    rules: axes.Pairs

    @classmethod
    def of(cls, mesh: Mesh, rules: axes.Rules | None = None) -> "Placement":
        """On a mesh of devices; None: by the table that names its axes."""
        if rules is None:
            rules = TRAINING if "fsdp" in mesh.axis_names else RULES
        return cls(automatic(mesh).abstract_mesh, tuple(sorted(rules.items())))


def entry[**P, R](fn: Callable[P, R]) -> Callable[P, R]:
    """`fn`, an entry point whose first argument is a model or what one has left.

    It is `narrow`, and traced for the mesh that the model lies on, if it does.
    """
    inner = narrow(fn)

    @functools.wraps(fn)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else kwargs.get("model")
        with on_mesh_of(first):
            return inner(*args, **kwargs)

    return called


@contextlib.contextmanager
def on_mesh_of(found: Any) -> Iterator[None]:
    """Traces are for the mesh of a model, or of what it has left."""
    where = placement_of(found)
    if where is None:
        yield
    else:
        with axes.split(where.mesh, where.rules):
            yield


def placement_of(found: Any) -> Placement | None:
    """What a model is spread over, or what is left of a prompt; None: one device."""
    where = getattr(found, "placement", None)
    if isinstance(where, Placement):
        return where
    there = _mesh(found)
    return None if there is None else Placement.of(there)


def _mesh(found: Any) -> Mesh | None:
    """The mesh that arrays of a model lie on, of several devices; None: another."""
    held = getattr(found, "embedding", None)
    try:
        held = None if held is None else held[...]
    except (TypeError, IndexError):  # no model: what is checked later says so
        return None
    if not isinstance(held, jax.Array) or isinstance(held, jax.core.Tracer):
        return None
    where = held.sharding
    if not isinstance(where, NamedSharding) or where.mesh.size == 1:
        return None
    return where.mesh if isinstance(where.mesh, Mesh) else None


def spread(model: Any, x: jax.Array, logical: Sequence[str | None]) -> jax.Array:
    """An array that lies nowhere in particular, on the mesh of the model.

    Every process holds all of it, and puts its own share there.
    """
    there = _mesh(model)
    if there is None or isinstance(x, jax.core.Tracer) or x.committed:
        return x
    where = NamedSharding(automatic(there), axes.spec(logical, x.shape))
    if where.is_fully_addressable:
        return jax.device_put(x, where)
    held = np.asarray(x)
    return jax.make_array_from_callback(held.shape, where, lambda i: held[i])


def over(model: Any, mesh: Mesh, rules: axes.Rules = RULES) -> Any:
    """The same decoder, its weights spread over a mesh as `kvjax.load` spreads them.

    Args:
        model: a decoder whose weights every process holds.
        mesh: devices, see `kvjax.load`.
        rules: likewise.

    Raises:
        ValueError: see `kvjax.load`.
    """
    mesh = automatic(mesh)
    check_heads(model.config.num_heads, model.config.num_kv_heads, mesh, rules)
    graph, state = nnx.split(model)
    for path, leaf in nnx.to_flat_state(state):
        array = leaf.get_value()
        name = ".".join(map(str, path))
        where = parameter_sharding(name, array.shape, mesh, rules)
        leaf.set_value(place(np.asarray(array), where))
    placed = nnx.merge(graph, state)
    placed.placement = Placement.of(mesh, rules)
    return placed
