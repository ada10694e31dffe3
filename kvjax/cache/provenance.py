"""Where a cache comes from: what must be the same for two of them to mix."""

import functools
import hashlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

_SEEDS = (0x9E3779B9, 0x7F4A7C15, 0xF39CC060, 0x5CEDC834)
"""Of the four sums of a digest: digits of the golden ratio."""


PIECE = 2**26
"""Bytes of weights that are on the host at a time."""


class Weights:
    """The numbers of a model as they were; their digest is made when it is asked for.

    Two are equal where they are of the same arrays, or where both digests are known and
    equal. Arrays are not kept alive: of a model that is gone, whose digest nobody asked
    for, it is unknown.
    """

    def __init__(self, arrays: Mapping[str, Any], digest: str | None = None):
        self._names = tuple(arrays)
        self._arrays = tuple(map(weakref.ref, arrays.values()))
        self._digest = digest

    @classmethod
    def of(cls, arrays: Mapping[str, Any]) -> "Weights":
        """Those of a model, the same object as long as its arrays are the same."""
        _LIVING[:] = [known for known in _LIVING if known.there]
        for known in _LIVING:
            if known.are(arrays):
                return known
        _LIVING.append(cls(arrays))
        return _LIVING[-1]

    @property
    def there(self) -> bool:
        """Whether all arrays are there still."""
        return all(held() is not None for held in self._arrays)

    def are(self, arrays: Mapping[str, Any]) -> bool:
        """Whether these are the arrays themselves."""
        return len(arrays) == len(self._arrays) and all(
            held() is x for held, x in zip(self._arrays, arrays.values(), strict=True)
        )

    @property
    def digest(self) -> str | None:
        """128 bits of all names and numbers, in hexadecimal; None if they are gone."""
        if self._digest is None:
            arrays = [held() for held in self._arrays]
            if not self.there:
                return None
            self._digest = _digest_of(self._names, arrays)
        return self._digest

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Weights):
            return NotImplemented
        known = self._digest is not None and self._digest == other._digest
        return self is other or known

    def __hash__(self) -> int:
        return hash(Weights)  # two that turn out to be equal were in one place before

    def __repr__(self) -> str:
        return f"Weights({self._digest or 'of a model'})"


_LIVING: list[Weights] = []
"""Of models that are there, with the digests that are known."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a cache comes from.

    Attributes:
        shape: digest of the configuration of the model, its RoPE aside.
        rope: digest of its RoPE.
        dtype: of the model.
        weights: its numbers; None: unknown, as under `jit`.
        compression: the compression's YAML, canonical.
        query_aware: whether scores saw the question: if so, it is nobody's prefix.
        prefix: of the cache in front, or None.
    """

    shape: str
    rope: str
    dtype: str
    weights: Weights | None = None
    compression: str
    query_aware: bool
    prefix: "Provenance | None" = None

    def differs(self, other: "Provenance") -> tuple[str, ...]:
        """What of the models of two caches is not the same, in words."""
        said = {"shape": "shape", "rope": "RoPE", "dtype": "dtype"}
        found = [
            word
            for name, word in said.items()
            if getattr(self, name) != getattr(other, name)
        ]
        if self.weights is None or other.weights is None or found:
            return tuple(found)
        if self.weights == other.weights:
            return ()
        digests = self.weights.digest, other.weights.digest
        return ("weights",) if None in digests or digests[0] != digests[1] else ()


def token_digest(
    tokens: Int[Array, "B T"], positions: Int[Array, "B T"]
) -> UInt32[Array, "B 4"]:
    """128 bits of which token stands at which position; padding (`EMPTY`) is none.

    The digest of a text is the sum of those of its pieces, however it was cut.
    """
    at = positions.astype(jnp.uint32)
    found = [_mixed(tokens.astype(jnp.uint32), at, seed) for seed in _SEEDS]
    live = positions >= 0
    sums = [jnp.sum(jnp.where(live, x, 0), axis=1, dtype=jnp.uint32) for x in found]
    return jnp.stack(sums, axis=1)


def host_digests(tokens: np.ndarray) -> np.ndarray:
    """`token_digest` of every beginning of one text, `[T + 1, 4]`, on the host."""
    at = np.arange(len(tokens), dtype=np.uint32)
    with np.errstate(over="ignore"):
        found = [_mixed(tokens.astype(np.uint32), at, seed, np) for seed in _SEEDS]
        sums = [np.cumsum(x, dtype=np.uint32) for x in found]
    return np.concatenate([np.zeros((1, 4), np.uint32), np.stack(sums, axis=1)])


def _mixed(x: Any, at: Any, seed: int, xp: Any = jnp) -> Any:
    """32 bits of a number and its place, each bit of either in all of them.

    Source: the finaliser of MurmurHash3, twice.
    """

    def final(h: Any) -> Any:
        h = (h ^ (h >> xp.uint32(16))) * xp.uint32(0x85EBCA6B)
        h = (h ^ (h >> xp.uint32(13))) * xp.uint32(0xC2B2AE35)
        return h ^ (h >> xp.uint32(16))

    return final(final(x + xp.uint32(seed)) ^ (at * xp.uint32(0x9E3779B1)))


def _digest_of(names: Sequence[str], arrays: Sequence[Any]) -> str:
    """Of arrays in their order, with their names, shapes and dtypes."""
    digest = hashlib.sha256()
    for name, array in zip(names, arrays, strict=True):
        digest.update(f"{name}{array.shape}{array.dtype}".encode())
        for piece in _pieces(array):
            digest.update(piece.reshape(-1).view(np.uint8))
    return digest.hexdigest()[:32]


def _pieces(x: jax.Array) -> Iterator[np.ndarray]:
    """The values in their order; no more than `PIECE` bytes are copied at once."""
    if x.nbytes <= PIECE or _in_sight(x):
        yield np.ascontiguousarray(x)
    elif len(x) == 1:
        yield from _pieces(x[0])
    else:
        rows = max(1, len(x) * PIECE // x.nbytes)
        for first in range(0, len(x), rows):
            size = min(rows, len(x) - first)
            yield from _pieces(jax.lax.dynamic_slice_in_dim(x, first, size))


def _in_sight(x: jax.Array) -> bool:
    """Whether NumPy sees the values where they are."""
    return [device.platform for device in x.devices()] == ["cpu"]


@functools.cache
def text_digest(text: str) -> str:
    """64 bits of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
