"""A store of prefixes: what several requests begin with is read once."""

import collections
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import jax
import numpy as np
from jaxtyping import Array, Int

from kvjax.cache import KVCache, Provenance, host_nbytes, restored
from kvjax.cache.provenance import host_digests
from kvjax.compress.config import Compression
from kvjax.fields import Range, fit
from kvjax.models import checks, origins
from kvjax.models.decoder import Decoder
from kvjax.models.prefix_entries import Entry, kind_of, left_in, name_of, read_by, row
from kvjax.models.prompts import NONE
from kvjax.places import check_place, given_path
from kvjax.types import nbytes_once

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


class PrefixStore:
    """Caches of prefixes by their tokens, the ones used last nearest to the device.

    A bounded number of bytes on the device, of bytes on the host below it, and a
    directory below that: what was not used for longest moves down, and off the last
    level it is gone. What is found on a lower level moves up again. A directory has no
    bound; with one, a model's weights are digested when its first cache is put in.

    What is found is right: of the same weights, shape, RoPE, dtype and compression, and
    of the very tokens, which are compared one by one. A cache whose scores saw a
    question is not taken. Compressed caches are found whole or not at all.

    Args:
        bytes: of caches on the device, what several share counted once.
        host_bytes: of caches in the host's memory, and of bodies that lie there.
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
        self._entries: dict[tuple[Any, ...], list[Entry]] = {}
        self._steps = 0
        self._lengths = collections.Counter[tuple[Any, ...]]()
        if self._folder is not None:
            check_place(self._folder, "Give the store another directory.")
            for entry in left_in(self._folder):
                self._add(entry)

    def __len__(self) -> int:
        return sum(map(len, self._entries.values()))

    @property
    def nbytes(self) -> int:
        """Bytes on the device; what several caches share counts once."""
        held = [entry.device for entry in self._all()]
        return nbytes_once(held) - host_nbytes(held)

    @property
    def host_nbytes(self) -> int:
        """Bytes in the host's memory."""
        held = [entry.device for entry in self._all()]
        return nbytes_once([entry.host for entry in self._all()]) + host_nbytes(held)

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
        given = row(tokens)
        about = _usable(cache, given)
        cache = cache.closed()
        beside = cache.host_nbytes
        self._fits("bytes", cache.nbytes - beside, self._most)
        self._fits("host_bytes", beside, self._most_host)
        if self._folder is not None and about.weights is not None:
            _ = about.weights.digest  # files have it; later the model may be gone
        entry = Entry(tokens=given, about=about, device=cache)
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
            ValueError: wrong shapes, no model, or no compression.
        """
        config, given = checks.model(model), row(tokens)
        checks.is_compression(c)
        asked = origins.provenance(config, model.dtype, c, origins.weights_of(model))
        kind, digests = kind_of(asked), None
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

    def _fits(self, name: str, size: int, most: int) -> None:
        if size > most:
            where = "the host" if name == "host_bytes" else "the device"
            raise ValueError(
                f"the cache has {size} bytes on {where}, more than the store's "
                f"`{name}`, {most}. Make the store larger, or compress the prefix."
            )

    def _all(self) -> Iterator[Entry]:
        """Entries, those that were not used for longest first."""
        found = [entry for some in self._entries.values() for entry in some]
        return iter(sorted(found, key=lambda entry: entry.used))

    def _add(self, entry: Entry) -> None:
        self._entries.setdefault(entry.key, []).append(entry)
        self._lengths[(*kind_of(entry.about), len(entry.tokens))] += 1
        self._use(entry)

    def _use(self, entry: Entry) -> None:
        self._steps += 1
        entry.used = self._steps

    def _drop(self, entry: Entry) -> None:
        some = self._entries[entry.key]
        some.remove(entry)
        if not some:
            del self._entries[entry.key]
        self._lengths[(*kind_of(entry.about), len(entry.tokens))] -= 1
        self._lengths += collections.Counter()  # without those that are 0

    def _raised(self, entry: Entry, model: Decoder) -> KVCache | None:
        """An entry's cache on the device; None if its files are damaged."""
        if entry.device is None and entry.host is not None:
            entry.device, entry.host = restored(entry.host), None
        if entry.device is None:
            entry.device = entry.read(model)
        cache = entry.device
        if cache is None:
            self._drop(entry)
            return None
        self._use(entry)
        self._settle()
        return cache

    def _settle(self) -> None:
        """What was not used for longest moves down, until each level has room."""
        for entry in self._all():
            if self.nbytes <= self._most:
                break
            if entry.device is not None and self._most_host:
                entry.host, entry.device = jax.device_get(entry.device), None
            elif entry.device is not None:
                self._to_disk(entry, entry.device)
        for entry in self._all():
            if self.host_nbytes <= self._most_host:
                break
            held = entry.host or entry.device
            if held is not None and (entry.host or held.host_nbytes):
                self._to_disk(entry, held)

    def _to_disk(self, entry: Entry, cache: KVCache) -> None:
        """Off the levels in memory: to the directory, or nowhere."""
        entry.device = entry.host = None
        if self._folder is None or not entry.written(self._folder, cache):
            self._drop(entry)


def _usable(cache: Any, tokens: np.ndarray) -> Provenance:
    """What made a cache that can be a prefix of others, and has read these tokens."""
    checks.is_cache("cache", cache)
    if len(cache.length) != 1:
        raise ValueError(
            f"`cache` must be of one row; got {len(cache.length)}. Prefill what rows "
            "have in common with a batch of 1."
        )
    made = origins.chain(cache.provenance)
    known = all(about.weights is not None for about in made)
    if cache.provenance is None or cache.digest is None or not known:
        raise ValueError(
            "`cache` does not say what made it, as one that was made inside of `jit`. "
            "Make it by `kvjax.prefill` outside of `jit`."
        )
    origins.is_agnostic("cache", cache)
    if name_of(tokens) != read_by(cache):
        raise ValueError(
            f"`cache` has read other tokens than the {len(tokens)} of `tokens`: it has "
            f"seen {int(cache.length[0])}. Give all that it has seen, in their order."
        )
    return cache.provenance
