"""Caches in files: arrays in safetensors, what they are in JSON; never pickle.

A directory holds `cache.json` and the file of arrays that it names. Arrays are written
first and `cache.json` takes its place last, so that there is a whole cache at any time,
the old one or the new one. Both carry digests: a file that was cut off or changed is
refused by name.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from kvjax.cache.merging import AbstractMerge
from kvjax.cache.paging import PageBudget
from kvjax.cache.parts import Growth
from kvjax.cache.provenance import Provenance, Weights
from kvjax.cache.ranking import AbstractRanking
from kvjax.cache.state import KVCache
from kvjax.cache.tracking import Folding
from kvjax.codecs import AbstractCodec
from kvjax.depth import Loop
from kvjax.files import digest, read_json, regular, replacing, write_json
from kvjax.memory import on_host, to_host
from kvjax.messages import shown
from kvjax.places import check_place, given_path
from kvjax.rope import Rope
from kvjax.types import PYTREES, LayerSpec

FILE = "cache.json"
FORMAT, VERSION = "kvjax cache", 1

_COMPONENTS = (AbstractCodec, AbstractRanking, AbstractMerge)
_RECORDS = (Growth, Folding, PageBudget, Loop, LayerSpec, Rope)


def save(cache: KVCache, directory: str | os.PathLike[str]) -> None:
    """Write a cache; see `KVCache.save`."""
    folder = given_path(directory)
    check_place(folder, "Save to another directory.")
    about = _said_of(cache)
    if os.path.lexists(folder / FILE):
        _content(folder)  # what is no cache of ours is not overwritten
    arrays: dict[int, Any] = {}
    tree = _written(dataclasses.replace(cache, provenance=None), arrays)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"cache-{os.urandom(8).hex()}.safetensors"
    with replacing(folder / name) as temporary:
        named = {str(n): _bits(x) for n, x in enumerate(arrays.values())}
        save_file(named, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
    content = {
        "format": FORMAT,
        "version": VERSION,
        "provenance": about,
        "cache": tree,
        "arrays": {"file": name, "sha256": digest(folder / name)},
    }
    write_json(folder / FILE, content | {"sha256": _digest(content)})
    for old in folder.glob("cache-*.safetensors"):
        if old.name != name:
            old.unlink(missing_ok=True)


def discard(folder: pathlib.Path) -> None:
    """Take away what `save` has written into a folder, damaged or not."""
    for old in (folder / FILE, *folder.glob("cache-*.safetensors")):
        old.unlink(missing_ok=True)


def read(directory: str | os.PathLike[str]) -> KVCache:
    """A cache that `save` wrote, with what made it.

    Raises:
        ValueError: no cache is there, or its files were cut off or changed.
    """
    folder = given_path(directory)
    content = _content(folder)
    about, arrays = content["provenance"], content["arrays"]
    file = folder / pathlib.PurePath(str(arrays["file"])).name
    if digest(regular(file)) != arrays["sha256"]:
        raise ValueError(
            f"{file} is not what was saved there: it was cut off or changed. Save the "
            "cache again."
        )
    with _readable(folder):
        cache = _Reader(load_file(file)).value(content["cache"])
        if not isinstance(cache, KVCache):
            raise TypeError(f"a {type(cache).__name__} in the place of a cache")
        return dataclasses.replace(cache, provenance=_provenance(about))


def provenance_in(folder: pathlib.Path) -> Provenance:
    """What made the cache that was saved in a directory; arrays are not looked at.

    Raises:
        ValueError: as `read`.
    """
    content = _content(folder)
    with _readable(folder):
        return _provenance(content["provenance"])


def _content(folder: pathlib.Path) -> dict[str, Any]:
    """What `cache.json` says.

    Raises:
        ValueError: it is not there, not ours, or not what was written.
    """
    file = folder / FILE
    if not folder.is_dir() or not file.is_file():
        raise ValueError(
            f"{shown(str(folder))} holds no cache: there is no {FILE}. "
            "`cache.save(directory)` writes one."
        )
    content = read_json(file)
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{file} is no cache that kvjax saved. Name the directory of one, or save "
            "to another."
        )
    if content.get("version") != VERSION:
        raise ValueError(
            f"{file} is of version {shown(content.get('version'))} of the format; this "
            f"kvjax reads {VERSION}. Prefill again, or use the kvjax that saved it."
        )
    said = content.pop("sha256", None)
    if said != _digest(content):
        raise ValueError(
            f"{file} is not what was saved there: it was changed. Save the cache again."
        )
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _said_of(cache: KVCache) -> dict[str, Any]:
    """What made a cache, for a file.

    Raises:
        ValueError: nobody knows it.
    """
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(cache)):
        raise ValueError("a cache is saved outside of `jit`, where its numbers are.")
    if cache.provenance is None or cache.digest is None:
        raise ValueError(
            "the cache does not say what made it, as one that was made inside of "
            "`jit`; nobody could check it later. Make it by `kvjax.prefill` outside of "
            "`jit`."
        )
    found = _provenance_tree(cache.provenance)
    if found["weights"] is None:
        raise ValueError(
            "the model that made the cache is gone, so that its weights cannot be "
            "named any more. Save the cache as long as the model is there."
        )
    return found


def _provenance_tree(about: Provenance) -> dict[str, Any]:
    fields = {f.name: getattr(about, f.name) for f in dataclasses.fields(about)}
    weights = None if about.weights is None else about.weights.digest
    front = None if about.prefix is None else _provenance_tree(about.prefix)
    return fields | {"weights": weights, "prefix": front}


def _provenance(tree: Mapping[str, Any]) -> Provenance:
    front = tree["prefix"]
    given = dict(tree) | {
        "weights": Weights({}, tree["weights"]),
        "prefix": None if front is None else _provenance(front),
    }
    return Provenance(**given)


def _written(value: Any, arrays: dict[int, Any]) -> Any:
    """What JSON can hold of a value; its arrays go into the list."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_written(one, arrays) for one in value]}
    if isinstance(value, Mapping):
        return {"dict": {key: _written(one, arrays) for key, one in value.items()}}
    if isinstance(value, jax.Array | np.ndarray):
        return _array(value, arrays)
    name = _name(type(value))
    known = _known().get(name)
    if known is None or known is not type(value):
        raise ValueError(
            f"the cache holds a {name}, which no file of a cache can hold. Make its "
            "class by `kvjax.types.pytree`, at the top of a module."
        )
    fields = dataclasses.fields(known)
    held = {f.name: _written(getattr(value, f.name), arrays) for f in fields if f.init}
    return {"is": name, "fields": held}


def _array(value: Any, arrays: dict[int, Any]) -> dict[str, Any]:
    """The number of an array, which is held once however often it is met."""
    if id(value) not in arrays:
        arrays[id(value)] = value
    said = {"array": list(arrays).index(id(value)), "dtype": value.dtype.name}
    if on_host(value):
        said["memory"] = "host"
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        said["dtype"], said["key"] = "uint32", str(jax.random.key_impl(value))
    return said


def _bits(value: Any) -> np.ndarray:
    """Numbers, of kinds that NumPy does not know too, as whole ones of their size."""
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    x = np.ascontiguousarray(value)
    return x.view(f"u{x.dtype.itemsize}")


class _Reader:
    """Values as `_written` said them; arrays that are met again are the same ones."""

    def __init__(self, bits: Mapping[str, np.ndarray]):
        self._bits, self._known = bits, _known()
        self._arrays: dict[int, jax.Array] = {}

    def value(self, tree: Any) -> Any:
        """The value of a tree of JSON."""
        if not isinstance(tree, Mapping):
            return tree
        if "array" in tree:
            return self._array(tree)
        if "is" in tree:
            cls = self._known[tree["is"]]
            return cls(**{k: self.value(one) for k, one in tree["fields"].items()})
        ((kind, held),) = tree.items()
        if kind == "dict":
            return {key: self.value(one) for key, one in held.items()}
        return {"tuple": tuple, "list": list}[kind](map(self.value, held))

    def _array(self, said: Mapping[str, Any]) -> jax.Array:
        number = said["array"]
        if number not in self._arrays:
            bits = self._bits[str(number)].view(jnp.dtype(said["dtype"]))
            held = jnp.asarray(bits)
            if "key" in said:
                held = jax.random.wrap_key_data(held, impl=said["key"])
            if said.get("memory") == "host":
                held = to_host(held)
            self._arrays[number] = held
        return self._arrays[number]


@contextlib.contextmanager
def _readable(folder: pathlib.Path) -> Iterator[None]:
    """What is whole, and still cannot be read, is of another kvjax."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as wrong:
        raise ValueError(
            f"the cache in {folder} cannot be read by this kvjax ({wrong!r:.200}). "
            "Prefill again, or use the kvjax that saved it."
        ) from None


def _known() -> dict[str, type]:
    """Classes that a file may name: pytrees, components, and a few records."""
    found, left = [*PYTREES, *_RECORDS], list[type](_COMPONENTS)
    while left:
        cls = left.pop()
        left += cls.__subclasses__()
        found.append(cls)
    return {_name(cls): cls for cls in found}


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
