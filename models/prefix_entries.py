"""One entry of a store of prefixes, wherever it is, and what it is in a directory."""

import dataclasses
import hashlib
import itertools
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from kvjax.cache import KVCache, Provenance
from kvjax.cache.files import discard, provenance_in
from kvjax.cache.provenance import host_digests
from kvjax.files import read_json, write_json
from kvjax.models import origins
from kvjax.models.arrays import whole
from kvjax.models.caches import load_cache
from kvjax.models.decoder import Decoder

LOG = logging.getLogger("kvjax.models")

TOKENS = "tokens.json"
"""Beside each cache in the directory of a store: what it has read."""

_IDS = 2**31
"""Ids of tokens are below."""


@dataclasses.dataclass(eq=False, kw_only=True)
class Entry:
    """A prefix: on the device, on the host or on the disk.

    Attributes:
        tokens: `[T]`, what it has read.
        about: what made it.
        used: when it was looked for last, in steps of the store.
        device, host: the cache.
        folder: where its files are.
    """

    tokens: np.ndarray
    about: Provenance
    used: int = 0
    device: KVCache | None = None
    host: KVCache | None = None
    folder: pathlib.Path | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Under which it is looked for: all that can be compared at once."""
        return (*kind_of(self.about), name_of(self.tokens))

    def written(self, directory: pathlib.Path, cache: KVCache) -> bool:
        """Whether its files are in the directory of a store now.

        Where they cannot be, a warning says why.
        """
        if self.folder is not None:
            return True
        weights = self.about.weights and self.about.weights.digest
        name = hashlib.sha256(f"{self.key} {weights}".encode())
        folder = directory / name.hexdigest()[:32]
        try:
            if not _sound(folder):
                discard(folder)
            cache.save(folder)
            write_json(folder / TOKENS, {"tokens": self.tokens.tolist()})
        except (ValueError, OSError) as wrong:
            LOG.warning("a prefix of the store is lost: %s", wrong)
            return False
        self.folder = folder
        return True

    def read(self, model: Decoder) -> KVCache | None:
        """The cache from its files; None, and a warning, if they are damaged."""
        assert self.folder is not None
        try:
            cache = load_cache(self.folder, model)
            if name_of(self.tokens) != read_by(cache):
                raise ValueError(
                    f"{self.folder / TOKENS} has other tokens than the cache beside it "
                    "has read: it was changed."
                )
        except ValueError as wrong:
            LOG.warning("a prefix of the store is gone: %s", wrong)
            return None
        return cache


def left_in(directory: pathlib.Path) -> Iterator[Entry]:
    """What an earlier store has written, the oldest first."""
    found = [path.parent for path in directory.glob(f"*/{TOKENS}")]
    for one in sorted(found, key=lambda path: path.stat().st_mtime_ns):
        try:
            tokens = row(read_json(one / TOKENS).get("tokens"))
            yield Entry(tokens=tokens, about=provenance_in(one), folder=one)
        except ValueError as wrong:
            LOG.warning("a prefix of the store is left out: %s", wrong)


def _sound(folder: pathlib.Path) -> bool:
    """Whether a folder is free, or has a cache that can be replaced."""
    try:
        return not folder.exists() or bool(provenance_in(folder))
    except ValueError:
        return False


def kind_of(about: Provenance) -> tuple[Any, ...]:
    """What of the model and of what was done must be the same, its weights aside."""
    done = [
        compression
        for compression, _ in itertools.groupby(
            origins.chain(about), lambda one: one.compression
        )
    ]
    return (about.shape, about.rope, about.dtype, tuple(done))


def name_of(tokens: np.ndarray) -> tuple[int, bytes]:
    """Length and digest of a text."""
    return len(tokens), host_digests(tokens)[-1].tobytes()


def read_by(cache: KVCache) -> tuple[int, bytes]:
    """The same of what a cache of one row has read."""
    return int(cache.length[0]), np.asarray(cache.digest)[0].tobytes()


def row(tokens: Any) -> np.ndarray:
    """Tokens of one row.

    Raises:
        ValueError: another shape, none, or numbers that are no ids.
    """
    found = np.asarray(whole("tokens", tokens, "shape [T]"))
    if found.ndim != 1 or not found.size:
        raise ValueError(
            f"`tokens` must be integers of shape [T], those of one row; got "
            f"{found.dtype} {found.shape}."
        )
    if found.min() < 0 or found.max() >= _IDS:
        raise ValueError(
            f"`tokens` must be ids from 0 on; got {found.min()} to {found.max()}."
        )
    return found.astype(np.int32)
