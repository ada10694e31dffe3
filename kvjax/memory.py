"""Arrays in the memory of a device and in that of its host, inside `jit` and out of it.

Where an array lies is part of its type (`jax.memory.Space`): an operation takes arrays
of one memory, and what is to be computed with is fetched first. On a GPU or TPU the
host's memory is pinned, and transfers run beside the computation where nothing waits
for them. A CPU has the same types, and copies nothing.
"""

from typing import Any

import jax
import jax.core


def to_host[T](tree: T) -> T:
    """All arrays of `tree` in the host's memory."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host), tree)


def to_device[T](tree: T) -> T:
    """All arrays of `tree` in the device's memory."""
    return jax.tree.map(
        lambda x: jax.device_put(x, jax.memory.Space.Device) if on_host(x) else x, tree
    )


def beside[T](tree: T, x: Any) -> T:
    """All arrays of `tree` in the memory that `x` lies in."""
    return to_host(tree) if on_host(x) else tree


def on_host(x: Any) -> bool:
    """Whether an array lies in the host's memory: by what it is, not what was asked."""
    if isinstance(x, jax.core.Tracer):
        return jax.typeof(x).memory_space == jax.memory.Space.Host
    where = getattr(x, "sharding", None)
    return getattr(where, "memory_kind", None) == "pinned_host"
