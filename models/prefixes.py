"""A store of prefixes: what several requests begin with is read once."""

import collections
import dataclasses
import hashlib
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import jax
import numpy as np
from jaxtyping import Array, Int

from kvjax.cache import KVCache, Provenance, restored
from kvjax.cache.files import provenance_in
from kvjax.cache.provenance import host_digests
from kvjax.compress.config import Compression
from kvjax.fields import Range, fit
from kvjax.files import read_json, write_json
from kvjax.models import checks, origins
from kvjax.models.arrays import whole
from kvjax.models.caches import load_cache
from kvjax.models.decoder import Decoder
from kvjax.models.prompts import NONE
from kvjax.places import check_place, given_path
from kvjax.types import nbytes_once

LOG = logging.getLogger("kvjax.models")

TOKENS = "tokens.json"
"""Beside each cache in the directory of a store: what it has read."""

Row = Sequence[int] | Int[Array | np.ndarray, "T"]
"""Tokens of one row."""

Bytes = Annotated[int, Range(0, 2**62)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefix:
    """What a store has found.

    Attributes:
        tokens: the beginning of the request that was read already, at least one token
            shorter than it.
        cache: of them, a `prefix=` of `kvjax.prefill` for the rest.
    """

    tokens: np.ndarray
    cache: KVCache


@dataclasses.dataclass(eq=False, kw_only=True)
class _Entry:
    """A prefix, wherever it is: on the device, on the host, on the disk."""

    tokens: np.ndarray
    about: Provenance
    device: KVCache | None = None
    host: KVCache | None = None
    folder: pathlib.Path | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Under which it is looked for: all that can be compared at once."""
        return (*_kind(self.about), _name(self.tokens))


class PrefixStore:
    """Caches of prefixes by their tokens, the ones used last nearest to the device.

    A bounded number of bytes on the device, of bytes on the host below it, and a
    directory below that: what was not used for longest moves down, and off the last
    level it is gone. What is found on a lower level moves up again.

    What is found is right: of the same weights, shape, RoPE, dtype and compression, and
    of the very tokens, which are compared one by one. A cache whose scores saw a
    question is not taken. Compressed caches are found whole or not at all.

    Args:
        bytes: of caches on the device, what several share counted once.
        host_bytes: of caches in the host's memory.
        directory: where caches go that are not held any more; what an earlier store has
            left there is found again. None: nowhere.

    Raises:
        ValueError: a bound below 0, or a directory that cannot be written to.

    Example:
        store = kvjax.PrefixStore(bytes=2**30, directory="prefixes")
        store.put(tokens, cache)
        found = store.longest(model, request, c)
        rest = request[len(found.tokens) :]
        logits, cache = kvjax.prefill(model, rest[None], prefix=found.cache)
    """

    def __init__(
        self,
        *,
        bytes: int,  # noqa: A002 - as everywhere: a budget of bytes
        host_bytes: int = 0,
        directory: str | os.PathLike[str] | None = None,
    ):
        self._most = fit(bytes, Bytes, "bytes")
        self._most_host = fit(host_bytes, Bytes, "host_bytes")
        self._folder = None if directory is None else given_path(directory)
        self._entries = collections.OrderedDict[tuple[Any, ...], list[_Entry]]()
        self._lengths = collections.Counter[tuple[Any, ...]]()
        if self._folder is not None:
            check_place(self._folder, "Give the store another directory.")
            for entry in _left_in(self._folder):
                self._add(entry)

    def __len__(self) -> int:
        return sum(map(len, self._entries.values()))

    @property
    def nbytes(self) -> int:
        """Bytes on the device; what several caches share counts once."""
        return nbytes_once([entry.device for entry in self._all()])

    @property
    def host_nbytes(self) -> int:
        """Bytes in the host's memory."""
        return nbytes_once([entry.host for entry in self._all()])

    def put(self, tokens: Row, cache: KVCache) -> None:
        """Take a cache of one row, which has read `tokens` and nothing else.

        Args:
            tokens: `[T]`, all that the cache has seen, its own prefix included.
            cache: of them; without room for later tokens, it is held without a copy.

        Raises:
            ValueError: a cache of several rows, of other tokens, of which nobody knows
                what made it, whose scores saw a question, or that is larger than the
                store.
        """
        given = _row(tokens)
        about = _usable(cache, given)
        cache = cache.closed()
        if cache.nbytes > self._most:
            raise ValueError(
                f"the cache has {cache.nbytes} bytes, more than the store's `bytes`, "
                f"{self._most}. Make the store larger, or compress the prefix."
            )
        entry = _Entry(tokens=given, about=about, device=cache)
        for old in self._entries.get(entry.key, []):
            if not old.about.differs(about):
                entry.folder = old.folder
                self._drop(old)
                break
        self._add(entry)
        self._settle()

    def longest(
        self, model: Decoder, tokens: Row, c: Compression = NONE
    ) -> Prefix | None:
        """The longest beginning of `tokens` of which there is a cache.

        At least one token is left over, since the logits of the last one are wanted.

        Args:
            model: the decoder that will go on.
            tokens: `[T]` of a request.
            c: what was done to the prefix's cache.

        Returns:
            None where nothing is known of it.

        Raises:
            ValueError: wrong shapes, or no model.
        """
        config, given = checks.model(model), _row(tokens)
        asked = origins.provenance(config, model.dtype, c, origins.weights_of(model))
        kind, digests = _kind(asked), None
        lengths = {n for (*one, n) in self._lengths if tuple(one) == kind}
        for n in sorted(lengths, reverse=True):
            if n >= len(given):
                continue
            digests = host_digests(given) if digests is None else digests
            name = (n, digests[n].tobytes())
            for entry in list(self._entries.get((*kind, name), [])):
                same = np.array_equal(entry.tokens, given[:n])
                if same and not entry.about.differs(asked):
                    cache = self._raised(entry, model)
                    if cache is not None:
                        return Prefix(tokens=entry.tokens, cache=cache)
        return None

    def _all(self) -> Iterator[_Entry]:
        """Entries, those that were not used for longest first."""
        return (entry for some in self._entries.values() for entry in some)

    def _add(self, entry: _Entry) -> None:
        self._entries.setdefault(entry.key, []).append(entry)
        self._entries.move_to_end(entry.key)
        self._lengths[(*_kind(entry.about), len(entry.tokens))] += 1

    def _drop(self, entry: _Entry) -> None:
        some = self._entries[entry.key]
        some.remove(entry)
        if not some:
            del self._entries[entry.key]
        self._lengths[(*_kind(entry.about), len(entry.tokens))] -= 1
        self._lengths += collections.Counter()  # without those that are 0

    def _raised(self, entry: _Entry, model: Decoder) -> KVCache | None:
        """An entry's cache on the device; None if its files are damaged."""
        if entry.device is None and entry.host is not None:
            entry.device, entry.host = restored(entry.host), None
        if entry.device is None:
            assert entry.folder is not None
            try:
                entry.device = load_cache(entry.folder, model)
            except ValueError as wrong:
                LOG.warning("a prefix of the store is gone: %s", wrong)
                self._drop(entry)
                return None
        cache = entry.device
        self._entries.move_to_end(entry.key)
        self._settle()
        return cache

    def _settle(self) -> None:
        """What was not used for longest moves down, until each level has room."""
        for entry in list(self._all()):
            if self.nbytes <= self._most:
                break
            if entry.device is None:
                continue
            if self._most_host:
                entry.host = jax.device_get(entry.device)
            else:
                self._to_disk(entry, entry.device)
            entry.device = None
        for entry in list(self._all()):
            if self.host_nbytes <= self._most_host:
                break
            if entry.host is not None:
                self._to_disk(entry, entry.host)
                entry.host = None
        for entry in list(self._all()):
            if entry.device is None and entry.host is None and entry.folder is None:
                self._drop(entry)

    def _to_disk(self, entry: _Entry, cache: KVCache) -> None:
        if self._folder is None or entry.folder is not None:
            return
        name = hashlib.sha256(f"{entry.key} {entry.about.weights}".encode())
        folder = self._folder / name.hexdigest()[:32]
        cache.save(folder)
        write_json(folder / TOKENS, {"tokens": entry.tokens.tolist()})
        entry.folder = folder


def _kind(about: Provenance) -> tuple[Any, ...]:
    """What of the model and of what was done must be the same, its weights aside."""
    done: list[str] = []
    one: Provenance | None = about
    while one is not None:
        if one.compression not in done[-1:]:
            done.append(one.compression)
        one = one.prefix
    return (about.shape, about.rope, about.dtype, tuple(done))


def _name(tokens: np.ndarray) -> tuple[int, bytes]:
    return len(tokens), host_digests(tokens)[-1].tobytes()


def _row(tokens: Any) -> np.ndarray:
    found = np.asarray(whole("tokens", tokens, "shape [T]"))
    if found.ndim != 1 or not found.size:
        raise ValueError(
            f"`tokens` must be integers of shape [T], those of one row; got "
            f"{found.dtype} {found.shape}."
        )
    return found.astype(np.int32)


def _usable(cache: Any, tokens: np.ndarray) -> Provenance:
    """What made a cache that can be a prefix of others, and has read these tokens."""
    checks.is_cache("cache", cache)
    if len(cache.length) != 1:
        raise ValueError(
            f"`cache` must be of one row; got {len(cache.length)}. Prefill what rows "
            "have in common with a batch of 1."
        )
    if cache.provenance is None or cache.digest is None:
        raise ValueError(
            "`cache` does not say what made it, as one that was made inside of `jit`. "
            "Make it by `kvjax.prefill` outside of `jit`."
        )
    origins.is_agnostic("cache", cache)
    if _name(tokens) != (int(cache.length[0]), np.asarray(cache.digest[0]).tobytes()):
        raise ValueError(
            f"`cache` has read other tokens than the {len(tokens)} of `tokens`: it has "
            f"seen {int(cache.length[0])}. Give all that it has seen, in their order."
        )
    return cache.provenance


def _left_in(folder: pathlib.Path) -> Iterator[_Entry]:
    """What an earlier store has written, the oldest first."""
    found = [path.parent for path in folder.glob(f"*/{TOKENS}")]
    for one in sorted(found, key=lambda path: path.stat().st_mtime_ns):
        try:
            tokens = _row(read_json(one / TOKENS).get("tokens"))
            yield _Entry(tokens=tokens, about=provenance_in(one), folder=one)
        except ValueError as wrong:
            LOG.warning("a prefix of the store is left out: %s", wrong)
