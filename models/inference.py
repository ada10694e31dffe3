"""Prefill, extend, generate: pure functions over a model and a cache.

A model is split once per call into a static graph and its parameters; a step is one
`jax.jit` over (parameters, cache, tokens), a whole generation one `while_loop`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kvjax.cache import KVCache, LayerCache, spread, token_digest
from kvjax.compress.building import Building, build_cache
from kvjax.compress.config import Compression
from kvjax.compress.observe import observe
from kvjax.compress.survey import Layout, plans_of
from kvjax.models import checks, origins
from kvjax.models.arrays import is_traced, together
from kvjax.models.chunked_prefill import prefill_in_chunks
from kvjax.models.decoder import Attending, Decoder
from kvjax.models.meshes import entry
from kvjax.models.padding import PROMPT, bucket, pad_tokens
from kvjax.models.prompts import NONE, settled
from kvjax.models.reading import (
    attend_prompt,
    in_front,
    last_logits,
    last_of,
    marks_of,
    observe_prompt,
    seen_before,
)
from kvjax.types import (
    LayerInputs,
    Lengths,
    LengthsLike,
    Tokens,
    TokensLike,
    loops_of,
    padded_positions,
)


def step(
    model: Decoder,
    cache: KVCache,
    tokens: Tokens,
    positions: Int[Array, "B T"],
    lengths: Lengths | None = None,
) -> tuple[Float[Array, "B t V"], KVCache]:
    """New tokens through the model and the cache; padding has position `EMPTY`.

    The cache's `length` stays. With `lengths`, `[B]` tokens per row, logits are of each
    row's last token, and `t` is 1.
    """
    own, front = cache.apart
    own = spread.laid_out(own)

    def attend(inputs: LayerInputs, groups: tuple[LayerCache, ...]):
        at = inputs.depth.group
        out, group = spread.attend(groups[at], inputs, inputs.depth.turn, front[at])
        return out, (*groups[:at], group, *groups[at + 1 :]), ()

    reading = Attending(step=attend, state=own.groups, loops=cache.loops)
    seen = model.run(tokens, positions, reading)
    hidden = seen.hidden
    if lengths is not None:
        hidden = last_of(hidden, lengths)[:, None]
    logits = model.logits(hidden)
    over = [jnp.any(group.overflow, axis=0) for group in seen.state]
    over = functools.reduce(jnp.logical_or, over)
    # Under `jit` nobody can be told that a token did not fit, so the row says so.
    logits = jnp.where(over[:, None, None], jnp.nan, logits)
    digest = cache.digest
    if digest is not None:
        digest = digest + token_digest(tokens, positions)
    after = dataclasses.replace(cache, groups=seen.state, digest=digest)
    return logits, after.behind(front)


@functools.partial(jax.jit, static_argnames=("graph", "c", "room", "longest"))
def _prefill(
    graph,
    params,
    tokens,
    lengths,
    c: Compression,
    room: int,
    longest: int | None,
    prefix: KVCache | None = None,
):
    model = nnx.merge(graph, params)
    specs, width = model.config.layers, tokens.shape[1]
    before, marks = seen_before(prefix), marks_of(prefix)

    if c.surveys:  # all layers first
        logits, seen = observe_prompt(model, tokens, lengths, c, prefix, longest)
        loops = loops_of(specs, plans_of(c, specs, longest or width), marks)
        how = (room, before, longest, marks)
        cache = build_cache(seen, loops, specs, lengths, c, *how)
        return logits, spread.laid_out(cache)
    how = (width, room, model.dtype, before, longest, marks)
    building = Building.of(c, specs, lengths, *how)
    groups = in_front(prefix, len(lengths), building.loops)

    def attend(inputs: LayerInputs, state: Any):
        out, inputs, sums = attend_prompt(c, inputs, lengths, groups)
        layout: Layout = inputs.depth.kind
        observed = observe(inputs, lengths + before, layout.plan, sums)
        return out, *building.step(inputs.depth, state, observed)

    compressing = Attending(
        step=attend,
        state=building.start(),
        kinds=building.found.layouts,
        loops=building.loops,
    )
    positions = padded_positions(lengths, width, before)
    seen = model.run(tokens, positions, compressing)
    logits = last_logits(model, seen.hidden, lengths)
    return logits, spread.laid_out(building.cache(seen.state, seen.left))


@jax.jit
def _digest(tokens, lengths, first, before):
    """Of all tokens, see `token_digest`: those of a digest `first`, and new ones."""
    found = token_digest(tokens, padded_positions(lengths, tokens.shape[1], before))
    return found if first is None else found + first


@functools.partial(jax.jit, static_argnames=("graph",))
def _extend(graph, params, cache, front, tokens, positions, lengths=None):
    how = (cache.behind(front), tokens, positions, lengths)
    logits, after = step(nnx.merge(graph, params), *how)
    return logits, after.apart[0]


@entry
def prefill(
    model: Decoder,
    tokens: TokensLike,
    lengths: LengthsLike | None = None,
    c: Compression = NONE,
    *,
    max_new_tokens: int = 64,
    prefix: KVCache | None = None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Logits of each row's last token, and the cache of the prompt, compressed.

    The logits are those of the uncompressed prompt: the first token of an answer
    never sees the compression. Both are handed out before they are computed, so nobody
    has looked whether the logits are finite: `generate` does.

    Args:
        model: a decoder.
        tokens: `[B, T]` right-padded token ids.
        lengths: `[B]` tokens per row; None: all of them.
        c: what is done to the cache; nothing by default.
        max_new_tokens: later tokens that must fit into the cache.
        prefix: a cache of one row, of tokens that are in front of every row; itself
            compressed or with a prefix, if you like. It is held once, and `c` is about
            the tokens behind it.

    Returns:
        `logits [B, V]` float32 and the cache.

    Raises:
        ValueError: wrong shapes, empty rows, tokens outside the vocabulary, a prompt
            beyond the model's range, a budget below what the method protects, a prefix
            of another model, of several rows, or whose scores saw a question, or in
            front of a prompt that is read again.
    """
    tokens, lengths = checks.asked(model, tokens, lengths)
    checks.compression(model.config, c, lengths)
    checks.count("max_new_tokens", max_new_tokens)
    # No row ever has more tokens, so no room is for more.
    max_new_tokens = min(max_new_tokens, model.config.max_positions)
    width, front = tokens.shape[1], None
    if prefix is not None:
        checks.prefix(model, c, prefix, lengths)
        together(tokens=tokens, prefix=prefix)
        front, prefix = prefix.provenance, nameless(prefix.closed())
    if not is_traced(tokens, lengths):
        tokens, width = pad_tokens(tokens, bucket(width, PROMPT)), bucket(width)
    how = (c, max_new_tokens, width, prefix)
    if c.schedule.chunk is None:
        graph, params = nnx.split(model)
        logits, cache = _prefill(graph, params, tokens, lengths, *how)
    else:
        logits, cache = prefill_in_chunks(model, tokens, lengths, *how)
    weights = origins.weights_of(model)
    about = origins.provenance(model.config, model.dtype, c, weights, front)
    known = (None, 0) if prefix is None else (prefix.digest, prefix.length[0])
    digest = None
    if prefix is None or prefix.digest is not None:
        digest = _digest(tokens, lengths, *known)
    cache = dataclasses.replace(cache, digest=digest, provenance=about)
    cache = settled(cache)
    return logits, cache.behind(in_front(prefix, len(lengths), cache.loops))


@entry
def extend(
    model: Decoder,
    cache: KVCache,
    tokens: TokensLike,
    lengths: LengthsLike | None = None,
    *,
    last: bool = False,
) -> tuple[Float[Array, "B t V"], KVCache]:
    """Logits of new tokens, and the cache that has seen them; `cache` stays as it is.

    Args:
        model: the decoder that made the cache.
        cache: the cache.
        tokens: `[B, T]` right-padded; one token per row is a decode step.
        lengths: `[B]` tokens per row; None: all of them.
        last: make the logits of each row's last token alone, as of a question.

    Returns:
        `logits [B, T, V]` float32 (anything behind a row's length), or `[B, 1, V]` with
        `last`; and the cache.

    Raises:
        ValueError: wrong shapes, tokens outside the vocabulary, a cache of another
            model, more tokens than fit. Under `jit`, where that cannot be seen, rows
            that overflow give NaN.
    """
    tokens, lengths = checks.extension(model, cache, tokens, lengths)
    width = tokens.shape[1]
    if width > 1 and not is_traced(tokens, lengths):
        tokens = pad_tokens(tokens, bucket(width))
    before = cache.length[:, None]
    positions = padded_positions(lengths, tokens.shape[1], before)
    graph, params = nnx.split(model)
    ends = lengths if last else None
    own, front = nameless(cache).apart
    logits, after = _extend(graph, params, own, front, tokens, positions, ends)
    length = cache.length + lengths
    after = dataclasses.replace(after, length=length, provenance=cache.provenance)
    return logits[:, :width], after.behind(front)


def nameless(cache: KVCache) -> KVCache:
    """`cache` without what made it, on which no program should depend."""
    return dataclasses.replace(cache, provenance=None)
