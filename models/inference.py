"""Prefill, extend, generate: pure functions over a model and a cache.

A model is split once per call into a static graph and its parameters; a step is one
`jax.jit` over (parameters, cache, tokens), a whole generation one `while_loop`.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kvjax.cache import KVCache, LayerCache
from kvjax.compress.config import Compression
from kvjax.compress.layer import build
from kvjax.compress.observe import Observed, observe, wants_mass
from kvjax.compress.trim import trim_layer
from kvjax.models import checks
from kvjax.models.config import DecoderConfig
from kvjax.models.decoder import Decoder
from kvjax.types import (
    EMPTY,
    LayerInputs,
    Lengths,
    LengthsLike,
    Tokens,
    TokensLike,
    padded_positions,
    pytree,
    static,
)

NONE = Compression()


def bucket(tokens: int) -> int:
    """Width that a sequence of `tokens` is padded to: four sizes per octave.

    Bounds the number of compilations under any mix of lengths; multiples of 16.
    """
    step = max(16, 1 << max(0, (tokens - 1).bit_length() - 3))
    return -(-tokens // step) * step


def pad_tokens(tokens: Tokens, width: int) -> Tokens:
    """Right-pad with token 0."""
    return jnp.pad(tokens, [(0, 0), (0, width - tokens.shape[1])])


def observe_prompt(
    model: Decoder, tokens: Tokens, lengths: Lengths, c: Compression
) -> tuple[Float[Array, "B V"], tuple[Observed, ...]]:
    """The pass over a prompt: logits of each row's last token, and what it leaves.

    What is left serves every budget of `c` (`Compression.with_keep`).
    """
    mass = wants_mass(c)
    seen: list[Observed] = []

    def attention(inputs: LayerInputs) -> Array:
        out, sums = c.prefill.attend(inputs, lengths, mass)
        seen.append(observe(inputs, lengths, c, sums))
        return out

    hidden = model(tokens, padded_positions(lengths, tokens.shape[1]), attention)
    return last_logits(model, hidden, lengths), tuple(seen)


def last_logits(
    model: Decoder, hidden: Float[Array, "B T E"], lengths: Lengths
) -> Float[Array, "B V"]:
    """Logits of each row's last token."""
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    return model.logits(jnp.take_along_axis(hidden, last, axis=1)[:, 0])


def build_cache(
    seen: Sequence[Observed], lengths: Lengths, c: Compression, room: int
) -> tuple[LayerCache, ...]:
    """The layers of the cache after a prompt, compressed."""
    layers, priorities = [], None
    for observed in seen:
        layer, priorities = build(
            observed, lengths, c, room=room, priorities=priorities
        )
        layers.append(layer)
    return tuple(layers)


def step(
    model: Decoder,
    layers: Sequence[LayerCache],
    tokens: Tokens,
    positions: Int[Array, "B T"],
) -> tuple[Float[Array, "B T V"], tuple[LayerCache, ...]]:
    """New tokens through the model and the cache; padding has position `EMPTY`."""
    after: list[LayerCache] = []

    def attention(inputs: LayerInputs) -> Array:
        out, layer = layers[inputs.spec.index].attend(inputs)
        after.append(layer)
        return out

    hidden = model(tokens, positions, attention)
    logits = model.logits(hidden)
    over = functools.reduce(jnp.logical_or, [layer.overflow for layer in after])
    # Under `jit` nobody can be told that a token did not fit, so the row says so.
    return jnp.where(over[:, None, None], jnp.nan, logits), tuple(after)


@functools.partial(jax.jit, static_argnames=("graph", "c", "room"))
def _prefill(graph, params, tokens, lengths, c: Compression, room: int):
    model = nnx.merge(graph, params)
    logits, seen = observe_prompt(model, tokens, lengths, c)
    return logits, build_cache(seen, lengths, c, room)


@functools.partial(jax.jit, static_argnames=("graph",))
def _extend(graph, params, layers, tokens, positions):
    return step(nnx.merge(graph, params), layers, tokens, positions)


def prefill(
    model: Decoder,
    tokens: TokensLike,
    lengths: LengthsLike | None = None,
    c: Compression = NONE,
    *,
    max_new_tokens: int = 64,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Logits of each row's last token, and the cache of the prompt, compressed.

    The logits are those of the uncompressed prompt: the first token of an answer
    never sees the compression.

    Args:
        model: a decoder.
        tokens: `[B, T]` right-padded token ids.
        lengths: `[B]` tokens per row; None: all of them.
        c: what is done to the cache; nothing by default.
        max_new_tokens: later tokens that must fit into the cache.

    Returns:
        `logits [B, V]` float32 and the cache.

    Raises:
        ValueError: wrong shapes, empty rows, tokens outside the vocabulary, a prompt
            beyond the model's range, a budget below what the method protects.
    """
    tokens, lengths = checks.prompt(model.config, tokens, lengths)
    checks.compression(model.config, c, lengths)
    checks.count("max_new_tokens", max_new_tokens)
    width = tokens.shape[1]
    if not checks.is_traced(tokens, lengths):
        tokens = pad_tokens(tokens, bucket(width))
    graph, params = nnx.split(model)
    logits, layers = _prefill(graph, params, tokens, lengths, c, max_new_tokens)
    cache = KVCache(
        layers=layers, length=lengths, provenance=checks.provenance(model.config, c)
    )
    return logits, trim(cache)


@functools.partial(jax.jit, static_argnames=("graph", "c"))
def _observe(graph, params, tokens, lengths, c: Compression):
    return observe_prompt(nnx.merge(graph, params), tokens, lengths, c)


_build = jax.jit(build_cache, static_argnames=("c", "room"))


@pytree
class Prompt:
    """A prompt that was read once and can be compressed to any budget.

    Attributes:
        logits: `[B, V]` of each row's last token.
        lengths: `[B]` tokens per row.
        seen: what the pass left, per layer; keys and values of all tokens included.
        config: of the model.
        method: the compression whose scores were computed, its budget aside.
    """

    logits: Float[Array, "B V"]
    lengths: Lengths
    seen: tuple[Observed, ...]
    config: DecoderConfig = static()
    method: Compression = static()

    def compress(self, c: Compression, *, max_new_tokens: int = 64) -> KVCache:
        """The cache that `prefill` with `c` gives; only the budget may differ."""
        if method_of(c) != self.method:
            raise ValueError(
                "this prompt was read for another method; only the budget may change. "
                "Read it again with `read_prompt(model, tokens, lengths, c)`."
            )
        checks.compression(self.config, c, self.lengths)
        checks.count("max_new_tokens", max_new_tokens)
        layers = _build(self.seen, self.lengths, c, max_new_tokens)
        provenance = checks.provenance(self.config, c)
        cache = KVCache(layers=layers, length=self.lengths, provenance=provenance)
        return trim(cache)


def method_of(c: Compression) -> Compression:
    """`c` without its budget."""
    return c.with_keep(1.0) if c.has_budget else c


def read_prompt(
    model: Decoder,
    tokens: TokensLike,
    lengths: LengthsLike | None = None,
    c: Compression = NONE,
) -> Prompt:
    """Prefill once, compress later: one pass (and one compilation) for many budgets.

    Arguments and errors are those of `prefill`.
    """
    tokens, lengths = checks.prompt(model.config, tokens, lengths)
    tokens = pad_tokens(tokens, bucket(tokens.shape[1]))
    method = method_of(c)
    graph, params = nnx.split(model)
    logits, seen = _observe(graph, params, tokens, lengths, method)
    return Prompt(
        logits=logits, lengths=lengths, seen=seen, config=model.config, method=method
    )


def trim(cache: KVCache) -> KVCache:
    """Cut low-rank parts to the rank that their energy target needs.

    A no-op under `jit`, where shapes cannot depend on data.
    """
    if checks.is_traced(cache.length):
        return cache
    layers = tuple(trim_layer(layer) for layer in cache.layers)
    return KVCache(layers=layers, length=cache.length, provenance=cache.provenance)


def extend(
    model: Decoder,
    cache: KVCache,
    tokens: TokensLike,
    lengths: LengthsLike | None = None,
) -> tuple[Float[Array, "B T V"], KVCache]:
    """Logits of new tokens, and the cache that has seen them; `cache` stays as it is.

    Args:
        model: the decoder that made the cache.
        cache: the cache.
        tokens: `[B, T]` right-padded; one token per row is a decode step.
        lengths: `[B]` tokens per row; None: all of them.

    Returns:
        `logits [B, T, V]` float32 (anything behind a row's length) and the cache.

    Raises:
        ValueError: wrong shapes, tokens outside the vocabulary, a cache of another
            model, more tokens than fit. Under `jit`, where that cannot be seen, rows
            that overflow give NaN.
    """
    tokens, lengths = checks.extension(model.config, cache, tokens, lengths)
    width = tokens.shape[1]
    if width > 1 and not checks.is_traced(tokens, lengths):
        tokens = pad_tokens(tokens, bucket(width))
    offset = padded_positions(lengths, tokens.shape[1])
    positions = jnp.where(offset >= 0, offset + cache.length[:, None], EMPTY)
    graph, params = nnx.split(model)
    logits, layers = _extend(graph, params, cache.layers, tokens, positions)
    cache = KVCache(
        layers=layers, length=cache.length + lengths, provenance=cache.provenance
    )
    return logits[:, :width], cache
