"""Arrays that callers hand in: what kind they are, what they hold, where they lie."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding

from kvjax.axes import as_numpy
from kvjax.messages import shown
from kvjax.models.sharding import automatic


def is_traced(*values: Any) -> bool:
    """Whether any value is a tracer, so that it cannot be looked at."""
    return any(isinstance(value, Tracer) for value in values)


def concrete(x: Any) -> np.ndarray | None:
    """The values, unless they are traced."""
    return None if is_traced(x) else as_numpy(x)


def held(name: str, values: Any) -> None:
    """No array of a tree was deleted, as those are that a program took for its own.

    Raises:
        ValueError: one was.
    """
    for x in jax.tree.leaves(values):
        if isinstance(x, jax.Array) and not is_traced(x) and x.is_deleted():
            raise ValueError(
                f"`{name}` holds nothing any more: an array of it was donated to a "
                "program, or deleted. Make it again, or copy it (`jnp.copy`) before it "
                "is donated."
            )


def _found(name: str, values: Any) -> np.ndarray | jax.Array | None:
    """As an array with a dtype, or None where there is none in it."""
    if is_traced(values):
        return values
    held(name, values)
    if isinstance(values, np.ma.MaskedArray):
        raise ValueError(
            f"`{name}` is a masked array, and a mask says nothing here. Fill it "
            "(`.filled(...)`), and say where rows end by `lengths`."
        )
    try:
        return as_numpy(values)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # ragged, and others
        return None


def _said(values: Any, found: Any) -> str:
    return shown(values) if found is None else f"{found.dtype} {found.shape}"


def whole(name: str, values: Any, wanted: str) -> np.ndarray | jax.Array:
    """Integers as they came, before anything cuts them to 32 bits.

    Args:
        name: of the argument.
        values: what was given.
        wanted: the shape, for the message.
    """
    found = _found(name, values)
    if (
        found is None
        or not jnp.issubdtype(found.dtype, jnp.integer)
        or jnp.issubdtype(found.dtype, np.timedelta64)  # integers, to NumPy
    ):
        raise ValueError(
            f"`{name}` must be integers of {wanted}; got {_said(values, found)}."
        )
    return found


def narrowed(given: Any, found: np.ndarray | jax.Array) -> jax.Array:
    """As int32, where the caller put it."""
    return _placed(given if isinstance(given, jax.Array) else found, jnp.int32)


def floats(name: str, values: Any, shape: tuple[int, ...], hint: str) -> jax.Array:
    """Numbers of that shape as float32, where the caller put them.

    Args:
        name: of the argument.
        values: what was given.
        shape: what it must have.
        hint: what has it, for the message.
    """
    if isinstance(values, jax.Array):
        held(name, values)
        found = values  # which stays where it is
    else:
        found = _found(name, values)
    if (
        found is None
        or found.shape != shape
        or not jnp.issubdtype(found.dtype, jnp.floating)
    ):
        raise ValueError(
            f"`{name}` must be numbers of shape [B, V] = {list(shape)}, as {hint}; got "
            f"{_said(values, found)}."
        )
    if not isinstance(found, jax.Array):
        with np.errstate(over="ignore"):  # infinity is told later, with its row
            found = found.astype(np.float32)
    return _placed(found, jnp.float32)


def _placed(x: np.ndarray | jax.Array, dtype: Any) -> jax.Array:
    """As a JAX array whose axes, if any, are left to the partitioner."""
    if isinstance(x, np.ndarray):
        # Also of another byte order, which JAX would read as it stands.
        return jnp.asarray(x.astype(np.dtype(dtype)))
    where = None if is_traced(x) else x.sharding
    if isinstance(where, NamedSharding) and AxisType.Explicit in where.mesh.axis_types:
        assert isinstance(where.mesh, jax.sharding.Mesh)  # an array lies on devices
        x = jax.device_put(x, NamedSharding(automatic(where.mesh), where.spec))
    return jnp.asarray(x, dtype)


def together(**given: Any) -> None:
    """What was put on devices lies on the same ones.

    Args:
        given: arrays, or trees of which the first array is looked at, by their names.

    Raises:
        ValueError: two do not.
    """
    places: dict[str, set[Any]] = {}
    for name, values in given.items():
        leaves = (x for x in jax.tree.leaves(values) if isinstance(x, jax.Array))
        first = next(leaves, None)
        if first is not None and not is_traced(first) and first.committed:
            places[name] = first.sharding.device_set
    for name, place in places.items():
        other, there = next(iter(places.items()))
        if place != there:
            raise ValueError(
                f"`{other}` lies on {_devices(there)} and `{name}` on "
                f"{_devices(place)}. Put both on the same ones by `jax.device_put`, or "
                "give tokens, lengths and logits as NumPy arrays, which go where the "
                "rest is."
            )


def _devices(found: set[Any]) -> str:
    names = sorted(map(str, found))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
