"""Arrays in the memory of a device and in that of its host, inside `jit` and out of it.

Where an array lies is part of its type (`jax.memory.Space`): an operation takes arrays
of one memory, and what is to be computed with is fetched first. On a GPU or TPU the
host's memory is pinned, so that a transfer may run beside a computation that does not
wait for it. A CPU has the same types, and copies nothing.
"""

from typing import Any

import jax
import jax.core

HOST = "pinned_host"
"""What JAX calls the host's memory that transfers need not be copied to first."""


def check_host(device: Any = None) -> None:
    """A device can use its host's memory.

    Args:
        device: which; None: the default one.

    Raises:
        ValueError: it cannot; says which memories it has.
    """
    device = jax.devices()[0] if device is None else device
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise ValueError(
            f"{device.device_kind} ({device}) cannot use the host's memory: it has no "
            f"{HOST!r}, only {kinds}. Leave `place` out, or use another device."
        )


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
    return getattr(where, "memory_kind", None) == HOST
