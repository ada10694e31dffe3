"""Generation: one compiled loop from the first token to the last."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kvjax import axes
from kvjax.axes import as_numpy
from kvjax.cache import Front, KVCache
from kvjax.compress.config import Compression
from kvjax.fields import Range, fit
from kvjax.messages import shown
from kvjax.models import checks
from kvjax.models.arrays import is_traced
from kvjax.models.config import DecoderConfig
from kvjax.models.decoder import Decoder
from kvjax.models.finite import check_rows
from kvjax.models.inference import nameless, prefill, step
from kvjax.models.meshes import entry
from kvjax.models.prompts import NONE
from kvjax.models.sampling import Sampling
from kvjax.types import EMPTY, LengthsLike, TokensLike, pytree

Callback = Callable[[np.ndarray, np.ndarray], None]

STOPS = 4
"""Stop tokens for which `generate` makes one program."""


class Generation(NamedTuple):
    """What `generate` returns.

    Attributes:
        tokens: `[B, N]` new tokens; the pad token behind a row's length.
        lengths: `[B]` new tokens of each row, the stop token included.
        cache: the cache after all of them but the last one, which nobody has read.
    """

    tokens: Int[Array, "B N"]
    lengths: Int[Array, "B"]
    cache: KVCache


@pytree
class _State:
    """What the loop carries besides the cache."""

    tokens: Int[Array, "B N"]
    count: Int[Array, ""]
    length: Int[Array, "B"]
    made: Int[Array, "B"]
    done: Bool[Array, "B"]
    key: Array
    sound: Bool[Array, "B"]


def _record(state: _State, logits: Array, token: Array, stops: Array) -> _State:
    """Append one token to the rows that still run."""
    # The largest of a row with NaN is NaN; -inf rules single tokens out.
    sound = state.done | jnp.isfinite(jnp.max(logits, axis=-1))
    pads = jnp.take(state.tokens, state.count, axis=1)
    tokens = state.tokens.at[:, state.count].set(jnp.where(state.done, pads, token))
    stopped = jnp.any(token[:, None] == stops[None], axis=-1)
    return dataclasses.replace(
        state,
        tokens=tokens,
        count=state.count + 1,
        made=state.made + (~state.done).astype(jnp.int32),
        done=state.done | stopped,
        sound=state.sound & sound,
    )


def _run(
    graph,
    params,
    cache: KVCache,
    front: Front,
    state: _State,
    limit: Int[Array, ""],
    stops: Int[Array, "S"],
    sampling: Sampling,
) -> tuple[KVCache, _State]:
    """Decode until `limit` tokens are made or every row has stopped.

    Of the cache comes back what is the rows' own; `front` is what they share.
    """
    model = nnx.merge(graph, params)

    def go_on(carry):
        _, state = carry
        more = (state.count < limit) & ~jnp.all(state.done)
        return more & jnp.all(state.sound)

    def body(carry):
        cache, state = carry
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.count - 1, 1, axis=1)
        positions = jnp.where(state.done, EMPTY, state.length)[:, None]
        logits, cache = step(model, cache.behind(front), last, positions)
        cache, _ = cache.apart
        key = now = state.key
        if not sampling.greedy:
            key, now = jax.random.split(key)
        token = sampling(logits[:, 0], now)
        length = state.length + (~state.done).astype(jnp.int32)
        state = dataclasses.replace(state, length=length, key=key)
        return cache, _record(state, logits[:, 0], token, stops)

    cache, state = jax.lax.while_loop(go_on, body, (cache, state))
    return cache, _everywhere(state)


def _everywhere(state: _State) -> _State:
    """What callers look at, on every device of a mesh."""
    look = ("tokens", "made", "done", "sound", "count")
    found = {name: getattr(state, name) for name in look}
    whole = {name: axes.laid_out(x, (None,) * x.ndim) for name, x in found.items()}
    return dataclasses.replace(state, **whole)


@functools.partial(jax.jit, static_argnames=("sampling", "room"))
def _first(logits, length, key, stops, pad, sampling: Sampling, room: int) -> _State:
    """The state after the token that the prompt's own logits give."""
    batch = logits.shape[0]
    key, now = jax.random.split(key)
    state = _State(
        tokens=jnp.full((batch, room), pad, jnp.int32),
        count=jnp.zeros((), jnp.int32),
        length=length,
        made=jnp.zeros((batch,), jnp.int32),
        done=jnp.zeros((batch,), jnp.bool_),
        key=key,
        sound=jnp.ones((batch,), jnp.bool_),
    )
    return _record(state, logits, sampling(logits, now), stops)


_static = ("graph", "sampling")
_decode = jax.jit(_run, static_argnames=_static)
# The loop's own cache may be overwritten; a caller's may not (caches are values).
_decode_donating = jax.jit(
    _run, static_argnames=_static, donate_argnames=("cache", "state")
)


@entry
def generate(
    model: Decoder,
    tokens: TokensLike,
    lengths: LengthsLike | None = None,
    c: Compression = NONE,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    key: Array | None = None,
    callback: Callback | None = None,
) -> Generation:
    """Prefill, compress and decode a batch of prompts.

    Args:
        model: a decoder.
        tokens: `[B, T]` right-padded prompts.
        lengths: `[B]` tokens per prompt; None: all of them.
        c: what is done to the cache.
        max_new_tokens: tokens to make at most, at least 1.
        temperature: 0 is greedy.
        top_k: only the `k` most likely tokens.
        top_p: only the most likely tokens up to this probability.
        stop_tokens: ids that end a row; the model's own end tokens are not implied.
        key: random key, needed unless greedy; the key is consumed.
        callback: called with `(tokens [B, n], lengths [B])` as tokens are made.

    Returns:
        Tokens, lengths and the cache.

    Raises:
        ValueError: see `prefill`; a generation beyond the model's range; a missing key;
            logits that are not finite. Under `jit`, where they cannot be looked at,
            generation ends with them.
    """
    checks.count("max_new_tokens", max_new_tokens, 1)
    tokens, lengths = checks.asked(model, tokens, lengths)
    checks.generation(model.config, lengths, max_new_tokens)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    stop_tokens = _stops(model.config, stop_tokens)
    key = _key(sampling, key)
    _callable(callback, model, tokens, lengths, key)
    logits, cache = prefill(model, tokens, lengths, c, max_new_tokens=max_new_tokens)
    return _loop(
        model,
        cache,
        logits,
        max_new_tokens,
        sampling,
        stop_tokens,
        key,
        callback,
        donate=not is_traced(tokens, lengths),
    )


@entry
def generate_from(
    model: Decoder,
    cache: KVCache,
    logits: Float[Array, "B V"],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    key: Array | None = None,
    callback: Callback | None = None,
) -> Generation:
    """Decode on from a cache, which stays as it is.

    Args:
        model: the decoder that made the cache.
        cache: with room for `max_new_tokens - 1` more tokens.
        logits: `[B, V]` of each row's last token.
        max_new_tokens: tokens to make at most, at least 1.
        temperature: 0 is greedy.
        top_k: only the `k` most likely tokens.
        top_p: only the most likely tokens up to this probability.
        stop_tokens: ids that end a row.
        key: random key, needed unless greedy; the key is consumed.
        callback: called with `(tokens [B, n], lengths [B])` as tokens are made.

    Raises:
        ValueError: a cache of another model or without the room, a missing key, logits
            that are not finite.
    """
    checks.count("max_new_tokens", max_new_tokens, 1)
    checks.room(model, cache, max_new_tokens - 1)
    logits = checks.last_logits(model, cache, logits)
    _callable(callback, model, cache, logits, key)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    stop_tokens = _stops(model.config, stop_tokens)
    key = _key(sampling, key)
    return _loop(
        model,
        cache,
        logits,
        max_new_tokens,
        sampling,
        stop_tokens,
        key,
        callback,
        donate=False,
    )


def _callable(callback: Any, model: Decoder, *given: Any) -> None:
    if callback is None:
        return
    if not callable(callback):
        raise ValueError(
            "`callback` must be a function of tokens and lengths; got "
            f"{shown(callback)}."
        )
    if is_traced(*jax.tree.leaves((nnx.state(model), given))):
        raise ValueError(
            "`callback` is called with tokens as they are made, which nobody can see "
            "under `jit` or another transformation of JAX. Leave it out there, or call "
            "outside of it: the loop is compiled anyway."
        )


def _stops(config: DecoderConfig, tokens: Sequence[int]) -> tuple[int, ...]:
    found = tokens.tolist() if isinstance(tokens, np.ndarray) else tokens
    if not isinstance(found, tuple | list):
        raise ValueError(
            f"`stop_tokens` must be a list of token ids; got {shown(tokens)}. One "
            "token is `[token]`."
        )
    ids = Annotated[int, Range(0, config.vocab_size - 1)]
    return fit(tuple(found), tuple[ids, ...], "stop_tokens")


def _key(sampling: Sampling, key: Array | None) -> Array:
    if key is None and not sampling.greedy:
        raise ValueError(
            f"temperature={sampling.temperature} draws tokens and needs a random key; "
            "pass key=jax.random.key(0), or temperature=0."
        )
    if key is None:
        return jax.random.key(0)
    typed = isinstance(key, jax.Array) and (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        and key.shape == ()
        or key.dtype == jnp.uint32
        and key.shape == jax.random.key_data(jax.random.key(0)).shape
    )
    if not typed:
        raise ValueError(
            f"`key` must be a random key of JAX; got {shown(key)}. Pass "
            "key=jax.random.key(0)."
        )
    return key


def _loop(
    model: Decoder,
    cache: KVCache,
    logits: Array,
    max_new_tokens: int,
    sampling: Sampling,
    stop_tokens: Sequence[int],
    key: Array,
    callback: Callback | None,
    donate: bool,
) -> Generation:
    graph, params = nnx.split(model)
    # -1 is no token: one program for any number of stop tokens up to these.
    stops = [*stop_tokens, *[-1] * max(0, STOPS - len(stop_tokens))]
    stops = jnp.asarray(stops, jnp.int32)
    pad = model.config.pad_token or 0
    state = _first(logits, cache.length, key, stops, pad, sampling, max_new_tokens)
    decode = _decode_donating if donate else _decode
    (held, front), made = nameless(cache).apart, 1
    ends = range(made, max_new_tokens) if callback else [max_new_tokens]
    if callback:
        check_rows(model.dtype, state.sound)
        callback(as_numpy(state.tokens[:, :1]), as_numpy(state.made))
    for end in ends:
        limit = jnp.asarray(end + 1 if callback else end, jnp.int32)
        held, state = decode(
            graph, params, held, front, state, limit, stops, sampling=sampling
        )
        decode = _decode_donating if not is_traced(state.length) else _decode
        if callback:
            check_rows(model.dtype, state.sound)
            made = int(state.count)
            callback(np.asarray(state.tokens[:, :made]), np.asarray(state.made))
            if bool(jnp.all(state.done)):
                break
    # Once, behind the loop, which a row that is not sound ends.
    check_rows(model.dtype, state.sound)
    after = dataclasses.replace(held, length=state.length, provenance=cache.provenance)
    after = after.behind(front)
    return Generation(tokens=state.tokens, lengths=state.made, cache=after)
