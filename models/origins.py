"""What made a cache, and whether it is of the model at hand."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx

from kvjax.cache import KVCache, Provenance, Weights, text_digest
from kvjax.compress.config import Compression
from kvjax.compress.presets import canonical
from kvjax.models.arrays import is_traced
from kvjax.models.config import DecoderConfig
from kvjax.rope import Rope


def is_agnostic(name: str, cache: KVCache) -> None:
    """No score of a cache has seen a question, so that it can be in front of any."""
    for about in chain(cache.provenance):
        if about.query_aware:
            raise ValueError(
                f"`{name}` was compressed by scores that saw a question (`visibility: "
                "query_aware`), and serves no other. Prefill it with `visibility: "
                "query_agnostic`."
            )


def chain(about: Provenance | None) -> Iterator[Provenance]:
    """What made a cache, what made its prefix, and so on."""
    while about is not None:
        yield about
        about = about.prefix


def provenance(
    config: DecoderConfig,
    dtype: Any,
    c: Compression,
    weights: Weights | None = None,
    prefix: Provenance | None = None,
) -> Provenance:
    """Where a cache of a model in this dtype and of this compression comes from."""
    shape, rope = _digests(config)
    return Provenance(
        shape=shape,
        rope=rope,
        dtype=jnp.dtype(dtype).name,
        weights=weights,
        compression=_canonical(c),
        query_aware=c.visibility == "query_aware",
        prefix=prefix,
    )


def weights_of(found: Any) -> Weights | None:
    """The numbers of a model; None where they are traced."""
    flat = nnx.to_flat_state(nnx.state(found, nnx.Param))
    arrays = {str(path): leaf.get_value() for path, leaf in flat}
    return None if is_traced(*arrays.values()) else Weights.of(arrays)


def made_by(name: str, found: Any, cache: KVCache) -> None:
    """The cache is one of this model.

    Raises:
        ValueError: it is of another; says what differs.
    """
    if cache.provenance is None:
        return
    how = (found.dtype, Compression(), weights_of(found))
    here = provenance(found.config, *how)
    if other := cache.provenance.differs(here):
        raise ValueError(
            f"{name} was made by another model, or by this one as it was before: its "
            f"{' and its '.join(other)} differ{'s' * (len(other) == 1)}. Prefill again "
            "with this one."
        )


@functools.lru_cache(maxsize=256)
def fingerprint(config: DecoderConfig) -> str:
    """Digest of a configuration."""
    return text_digest(repr(config))


@functools.lru_cache(maxsize=256)
def _digests(config: DecoderConfig) -> tuple[str, str]:
    """Of a configuration without its RoPE, and of that."""
    plain = Rope(head_dim=config.head_dim)
    # Fresh weights alone depend on `init_std`.
    given = {"rope": plain, "local_rope": None, "init_std": 0.02}
    rest = dataclasses.replace(config, **given)
    return text_digest(repr(rest)), text_digest(f"{config.rope} {config.local_rope}")


@functools.lru_cache(maxsize=256)
def _canonical(c: Compression) -> str:
    return canonical(c)
