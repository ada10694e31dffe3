"""A prompt that is read once, and compressed to any budget later."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt32

from kvjax.cache import KVCache, Weights, spread, token_digest
from kvjax.compress.building import build_cache
from kvjax.compress.config import Compression
from kvjax.compress.observe import Observed
from kvjax.compress.survey import plans_of
from kvjax.models import checks, origins
from kvjax.models.arrays import is_traced
from kvjax.models.config import DecoderConfig
from kvjax.models.decoder import Decoder
from kvjax.models.finite import check_logits
from kvjax.models.meshes import Placement, entry, placement_of
from kvjax.models.padding import PROMPT, bucket, pad_tokens
from kvjax.models.reading import observe_prompt
from kvjax.types import (
    Lengths,
    LengthsLike,
    TokensLike,
    loops_of,
    padded_positions,
    pytree,
    static,
)

NONE = Compression()


@functools.partial(jax.jit, static_argnames=("graph", "c", "longest"))
def _observe(graph, params, tokens, lengths, c: Compression, longest: int):
    model = nnx.merge(graph, params)
    logits, seen = observe_prompt(model, tokens, lengths, c, longest=longest)
    digest = token_digest(tokens, padded_positions(lengths, tokens.shape[1]))
    return logits, seen, digest


@functools.wraps(build_cache)
def _built(*args, **how) -> KVCache:
    return spread.laid_out(build_cache(*args, **how))


_static = ("loops", "specs", "c", "room", "longest")
_build = jax.jit(_built, static_argnames=_static)


@pytree
class Prompt:
    """A prompt that was read once and can be compressed to any budget.

    Attributes:
        logits: `[B, V]` of each row's last token.
        lengths: `[B]` tokens per row.
        seen: what the pass left; keys and values of all tokens included.
        config: of the model.
        dtype: of the model.
        method: the compression whose scores were computed, its budget aside.
        longest: no row has more tokens.
        digest: of the tokens, see `KVCache`.
        weights: of the model, where they are known.
        placement: of the model, where it is spread over a mesh.
    """

    logits: Float[Array, "B V"]
    lengths: Lengths
    seen: tuple[Observed, ...]
    config: DecoderConfig = static()
    dtype: jnp.dtype = static()
    method: Compression = static()
    longest: int = static()
    digest: UInt32[Array, "B 4"] | None = None
    weights: Weights | None = static(default=None)
    placement: Placement | None = static(default=None)

    @entry
    def compress(self, c: Compression, *, max_new_tokens: int = 64) -> KVCache:
        """The cache that `prefill` with `c` gives; only the budget may differ."""
        checks.compression(self.config, c, self.lengths)
        if method_of(c) != self.method:
            raise ValueError(
                "this prompt was read for another method; only the budget may change. "
                "Read it again with `read_prompt(model, tokens, lengths, c)`."
            )
        checks.count("max_new_tokens", max_new_tokens)
        max_new_tokens = min(max_new_tokens, self.config.max_positions)
        specs, longest = self.config.layers, self.longest
        loops = loops_of(specs, plans_of(self.method, specs, longest))
        how = (self.lengths, c, max_new_tokens)
        cache = _build(self.seen, loops, specs, *how, longest=longest)
        about = origins.provenance(self.config, self.dtype, c, self.weights)
        cache = dataclasses.replace(cache, digest=self.digest, provenance=about)
        return settled(cache)


class CompressedPrompt(NamedTuple):
    """A prompt that was compressed while it was read, to one budget (`every_chunk`).

    Attributes:
        c: to which.
        room: later tokens that fit.
        logits: `[B, V]` of each row's last token.
        cache: what it was compressed to.
    """

    c: Compression
    room: int
    logits: Float[Array, "B V"]
    cache: KVCache

    def compress(self, c: Compression, *, max_new_tokens: int = 64) -> KVCache:
        """The cache that it was compressed to, and to no other budget."""
        if c != self.c or max_new_tokens > self.room:
            raise ValueError(
                "this prompt was compressed while it was read (schedule every_chunk), "
                f"with room for {self.room} tokens. Read it again for another budget "
                "or more tokens."
            )
        return self.cache


def check_whole(c: Compression) -> None:
    """The compression looks at a prompt that has been read."""
    if c.schedule.chunk is not None:
        raise ValueError(
            "schedule every_chunk compresses while it reads, to one budget; got size="
            f"{c.schedule.chunk}. Use kvjax.prefill, once for every budget."
        )


def method_of(c: Compression) -> Compression:
    """`c` without its budget."""
    return c.with_keep(1.0) if c.has_budget else c


@entry
def read_prompt(
    model: Decoder,
    tokens: TokensLike,
    lengths: LengthsLike | None = None,
    c: Compression = NONE,
) -> Prompt:
    """Prefill once, compress later: one pass (and one compilation) for many budgets.

    Arguments and errors are those of `prefill`, and logits that are not finite; nor can
    `c` compress while it reads (`every_chunk`).
    """
    tokens, lengths = checks.asked(model, tokens, lengths)
    checks.compression(model.config, c, lengths)
    check_whole(c)
    width, method = tokens.shape[1], method_of(c)
    tokens, longest = pad_tokens(tokens, bucket(width, PROMPT)), bucket(width)
    graph, params = nnx.split(model)
    logits, seen, digest = _observe(graph, params, tokens, lengths, method, longest)
    check_logits(model.dtype, logits, " behind the prompts")
    return Prompt(
        logits=logits,
        lengths=lengths,
        seen=seen,
        config=model.config,
        dtype=model.dtype,
        method=method,
        longest=longest,
        digest=digest,
        weights=origins.weights_of(model),
        placement=placement_of(model),
    )


def settled(cache: KVCache) -> KVCache:
    """`cache` in arrays cut to what the data need, where they say so: ranks.

    Under `jit`, where shapes cannot depend on data, it stays as it is.
    """
    return cache if is_traced(cache.length) else cache.settled()
