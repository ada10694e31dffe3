"""Caches that were saved, read again for the model that made them."""

import os

from kvjax.cache import KVCache
from kvjax.cache.files import read
from kvjax.messages import shown
from kvjax.models import checks, origins
from kvjax.models.decoder import Decoder


def load_cache(directory: str | os.PathLike[str], model: Decoder) -> KVCache:
    """A cache that `KVCache.save` wrote, bit for bit.

    Args:
        directory: where it was saved.
        model: the one that made it, loaded again perhaps: the same shape, RoPE, dtype
            and weights.

    Raises:
        ValueError: no cache is there, its files were cut off or changed, or another
            model made it; says what differs.
    """
    checks.model(model)
    cache = read(directory)
    origins.made_by(f"the cache in {shown(os.fspath(directory))}", model, cache)
    return cache
