"""Which memory the bodies of a cache lie in: the device's, or its host's."""

import dataclasses
from typing import Annotated, Any

import jax

from kvjax.cache.parts import AbstractPart
from kvjax.codecs import AbstractEncoded, OnHost
from kvjax.fields import Checked, OneOf
from kvjax.memory import to_host
from kvjax.types import nbytes_once

Body = Annotated[str, OneOf("device", "host")]
"""Where bodies lie."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Places(Checked):
    """Where what is stored lies.

    Attributes:
        body: of a layer's cache: `host` puts its keys and values into the host's
            memory, from which a step fetches what it reads, block by block or page by
            page. Positions, what pages are chosen by, and the newest tokens stay on the
            device.
    """

    body: Body = "device"


def placed[P: AbstractPart](part: P, body: str) -> P:
    """The same part with its keys and values in a memory."""
    held = {
        field.name: _moved(getattr(part, field.name), body)
        for field in dataclasses.fields(part)  # type: ignore[arg-type]
        if isinstance(getattr(part, field.name), AbstractEncoded | AbstractPart)
    }
    return dataclasses.replace(part, **held)  # type: ignore[type-var]


def _moved(held: Any, body: str) -> Any:
    if isinstance(held, AbstractPart):  # one that is shared
        return placed(held, body)
    if isinstance(held, OnHost) == (body == "host"):
        return held
    return OnHost.moved(held) if body == "host" else held.fetched


def restored[T](tree: T) -> T:
    """A tree of caches, in NumPy arrays, on the device and where else it was."""
    moved: dict[int, jax.Array] = {}

    def back(x: jax.Array) -> jax.Array:
        return moved.setdefault(id(x), to_host(x))

    def one(x: Any) -> Any:
        return OnHost(of=jax.tree.map(back, x.of)) if isinstance(x, OnHost) else x

    there = jax.device_put(tree)
    return jax.tree.map(one, there, is_leaf=lambda x: isinstance(x, OnHost))


def host_nbytes(tree: Any) -> int:
    """Bytes of what a tree of caches has in the host's memory; of each array once."""
    found = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, OnHost))
    return nbytes_once([x for x in found if isinstance(x, OnHost)])
