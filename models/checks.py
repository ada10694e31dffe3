"""Checks at the boundary of inference: wrong input is named before any compute."""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import KVCache
from kvjax.compress.config import Compression
from kvjax.compress.plan import LayerPlan
from kvjax.fields import Range, fit
from kvjax.memory import check_host
from kvjax.messages import shown
from kvjax.models import origins
from kvjax.models.arrays import (
    concrete,
    floats,
    held,
    narrowed,
    together,
    whole,
)
from kvjax.models.config import DecoderConfig
from kvjax.models.meshes import spread
from kvjax.prefills import AbstractPrefill

ROWS, WHOLE = ("batch", None), (None,)
"""Logical axes of tokens and of lengths."""


def count(name: str, value: int, least: int = 0) -> None:
    """`value` is an integer of at least `least`."""
    fit(value, Annotated[int, Range(least, 2**31 - 1)], name)


def model(found: Any) -> DecoderConfig:
    """The configuration of what was given as a model."""
    config = getattr(found, "config", None)
    if not isinstance(config, DecoderConfig):
        raise ValueError(
            f"`model` must be a kvjax Decoder; got {shown(found)}. `kvjax.load` makes "
            "one of a directory or a hub id."
        )
    return config


def _token_array(config: DecoderConfig, tokens) -> jax.Array:
    found = whole("tokens", tokens, "shape [B, T]")
    if found.ndim != 2:
        raise ValueError(
            f"`tokens` must be integers of shape [B, T]; got {found.dtype} "
            f"{found.shape}. A single prompt is `tokens[None]`."
        )
    if 0 in found.shape:
        raise ValueError(
            f"`tokens` must hold at least one row and one token; got {found.shape}."
        )
    values = concrete(found)
    if values is not None and (values.min() < 0 or values.max() >= config.vocab_size):
        raise ValueError(
            f"`tokens` must be in [0, {config.vocab_size}), the model's vocabulary; "
            f"got {int(values.min())} .. {int(values.max())}. Encode with the model's "
            "own tokenizer, and pad with any id of it."
        )
    return narrowed(tokens, found)


def _row_lengths(tokens: jax.Array, lengths, least: int) -> jax.Array:
    if lengths is None:
        return jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
    wanted = f"shape [B] = [{tokens.shape[0]}]"
    found = whole("lengths", lengths, wanted)
    if found.shape != tokens.shape[:1]:
        raise ValueError(
            f"`lengths` must be integers of {wanted}; got {found.dtype} {found.shape}."
        )
    values = concrete(found)
    if values is not None and (values.min() < least or values.max() > tokens.shape[1]):
        row = int(np.argmax((values < least) | (values > tokens.shape[1])))
        raise ValueError(
            f"`lengths` must be in [{least}, {tokens.shape[1]}]; row {row} has "
            f"{int(values[row])}. "
            + ("Leave empty prompts out of the batch." if values[row] < least else "")
        )
    return narrowed(lengths, found)


def prompt(config: DecoderConfig, tokens, lengths) -> tuple[jax.Array, jax.Array]:
    """Tokens and lengths of a prompt, as int32."""
    tokens = _token_array(config, tokens)
    lengths = _row_lengths(tokens, lengths, 1)
    values = concrete(lengths)
    longest = tokens.shape[1] if values is None else int(values.max())
    if longest > config.max_positions:
        raise ValueError(
            f"the prompt has {longest} tokens, the model's range is "
            f"{config.max_positions}. Cut the prompt, or load the model with a RoPE "
            "scaling and a larger max_position_embeddings."
        )
    return tokens, lengths


def asked(found: Any, tokens, lengths) -> tuple[jax.Array, jax.Array]:
    """`prompt`, of what was given as a model, which lies where its prompt does."""
    tokens, lengths = prompt(model(found), tokens, lengths)
    together(model=found.embedding[...], tokens=tokens, lengths=lengths)
    return spread(found, tokens, ROWS), spread(found, lengths, WHOLE)


def prompt_lengths(inner, lengths: jax.Array) -> jax.Array:
    """Compression points, as int32: at least 1 and inside each row."""
    wanted = f"shape {lengths.shape}"
    found = whole("prompt_lengths", inner, wanted)
    if found.shape != lengths.shape:
        raise ValueError(
            f"`prompt_lengths` must be integers of {wanted}; got {found.dtype} "
            f"{found.shape}."
        )
    values, rows = concrete(found), concrete(lengths)
    if values is not None and (values.min() < 1):
        raise ValueError(f"`prompt_lengths` must be at least 1; got {values.min()}.")
    if values is not None and rows is not None and (values > rows).any():
        row = int(np.argmax(values > rows))
        raise ValueError(
            f"`prompt_lengths` must not be above `lengths`; row {row} has "
            f"{int(values[row])} of {int(rows[row])}."
        )
    return narrowed(inner, found)


def generation(
    config: DecoderConfig, lengths: jax.Array, new_tokens: int | np.ndarray
) -> None:
    """Prompt and generation of each row together stay in the model's range."""
    values = concrete(lengths)
    if values is None:
        return
    new = np.broadcast_to(new_tokens, values.shape)
    row = int(np.argmax(values + new))
    total = int(values[row] + new[row])
    if total > config.max_positions:
        raise ValueError(
            f"{int(values[row])} prompt tokens and {int(new[row])} new ones are "
            f"{total}, the model's range is {config.max_positions}. Lower "
            "`max_new_tokens` or cut the prompt."
        )


def extension(
    found: Any, cache: KVCache, tokens, lengths
) -> tuple[jax.Array, jax.Array]:
    """Tokens and lengths that extend a cache of a model, as int32."""
    config = model(found)
    is_cache("cache", cache)
    tokens = _token_array(config, tokens)
    if tokens.shape[0] != cache.length.shape[0]:
        raise ValueError(
            f"`tokens` must have one row per row of the cache, "
            f"{cache.length.shape[0]}; got {tokens.shape[0]}."
        )
    lengths = _row_lengths(tokens, lengths, 0)
    new = concrete(lengths)
    room(found, cache, np.full(len(tokens), tokens.shape[1]) if new is None else new)
    together(model=found.embedding[...], cache=cache, tokens=tokens, lengths=lengths)
    return spread(found, tokens, ROWS), spread(found, lengths, WHOLE)


def is_cache(name: str, found: Any) -> None:
    """It is a cache, and holds something."""
    if not isinstance(found, KVCache):
        raise ValueError(
            f"`{name}` must be a KVCache that kvjax.prefill made; got {shown(found)}."
        )
    held(name, found)


def last_logits(found: Any, cache: KVCache, logits: Any) -> jax.Array:
    """Logits of each row's last token, of this model and this cache, as float32."""
    shape = (len(cache.length), model(found).vocab_size)
    logits = floats("logits", logits, shape, "kvjax.prefill gives them")
    together(model=found.embedding[...], cache=cache, logits=logits)
    return logits


def room(found: Any, cache: KVCache, new_tokens: int | np.ndarray) -> None:
    """The cache is this model's and takes `new_tokens` more, of each row or of all."""
    config = model(found)
    is_cache("cache", cache)
    origins.made_by("`cache`", found, cache)
    if concrete(cache.length) is None:
        return
    new = np.broadcast_to(new_tokens, cache.length.shape)
    generation(config, cache.length, new)
    left = cache.rooms
    if left is None or (new <= left).all():
        return
    row = int(np.argmax(new - left))
    raise ValueError(
        f"{int(new[row])} new tokens of row {row} do not fit: the cache has room for "
        f"{int(left[row])}. Prefill with a larger `max_new_tokens`."
    )


def compression(config: DecoderConfig, c: Compression, lengths: jax.Array) -> None:
    """The compression fits the model and these prompts."""
    is_compression(c)
    suits(config, c)
    values = concrete(lengths)
    if values is None:
        return
    _protected(c, config.layers, values)
    for score in c.scores:
        score.validate(int(values.max()), config.vocab_size, config.max_positions)


def is_compression(c: Any) -> None:
    """It is a `Compression`."""
    if not isinstance(c, Compression):
        raise ValueError(
            f"`c` must be a kvjax.Compression; got {shown(c)}. Names become one by "
            'kvjax.compression("snapkv").'
        )


def suits(config: DecoderConfig, c: Compression) -> None:
    """The model has what the compression asks of it."""
    for plan in c.parts:
        _plan(config, plan)
    if any(plan.store.place.body == "host" for plan in c.parts):
        check_host()
    reading(config, c.prefill)
    _retention(config, any(score.needs_retention for score in c.scores))
    _ranges(config, c)


def reading(config: DecoderConfig, prefill: AbstractPrefill) -> None:
    """The model can read prompts in this way."""
    if not isinstance(prefill, AbstractPrefill):
        raise ValueError(
            '`prefill` must be a way to read prompts, as `kvjax.compression("snapkv")'
            f".prefill` is; got {shown(prefill)}."
        )
    prefill.suits(config.num_layers, config.num_heads)
    _retention(config, prefill.needs_retention)


def _retention(config: DecoderConfig, wanted: bool) -> None:
    if wanted and config.evictor is None:
        raise ValueError(
            "the compression evicts what the model gives up, and this model says "
            "nothing of it: it has no evictor. Train one (`kvjax finetune`, config "
            "dms or surrogate), or use another compression."
        )


def _plan(config: DecoderConfig, plan: LayerPlan) -> None:
    """What is done in a layer can be done to layers of this model."""
    bases = config.projection.sides if config.projection else ()
    for side, codec in zip(("key", "value"), plan.store.codecs, strict=True):
        codec.validate(config.head_dim)
        if codec.needs_basis and side not in bases:
            raise ValueError(
                f"store.{side}s holds coefficients in the model's own basis of its "
                f"{side}s, and this model has none. Train one (`kvjax finetune`, "
                "config matryoshka), or use another compression."
            )
    budget = None if plan.evict is None else plan.evict.budget
    if budget is not None and budget.needs_gates and not config.head_gates:
        raise ValueError(
            f"{type(budget).__name__} gives slots to the heads that need the "
            "whole context, and this model does not know them: it has no gates. Train "
            "them (`kvjax finetune --config duo`), or use another compression."
        )


def prefix(found: Any, c: Compression, cache: KVCache, lengths: jax.Array) -> None:
    """A cache can be what is in front of prompts that are compressed like this."""
    config = model(found)
    if c.probes:
        names = ", ".join(type(score).__name__ for score in c.scores if score.probes)
        raise ValueError(
            f"{names} reads the prompt again, and would not see a `prefix` in front of "
            "it. Put the prefix into the prompts, or use another score."
        )
    is_cache("prefix", cache)
    together(model=found.embedding[...], prefix=cache)
    if len(cache.length) != 1:
        raise ValueError(
            f"`prefix` must be a cache of one row, which all rows share; got one of "
            f"{len(cache.length)}. Prefill it with a batch of 1."
        )
    origins.made_by("`prefix`", found, cache)
    origins.is_agnostic("prefix", cache)
    values, seen = concrete(lengths), concrete(cache.length)
    if values is None or seen is None:
        return
    longest = int(values.max() + seen[0])
    if longest > config.max_positions:
        raise ValueError(
            f"the prefix of {int(seen[0])} tokens and a prompt of {int(values.max())} "
            f"are {longest} tokens; the model's range is {config.max_positions}. "
            "Shorten one of them."
        )


def _ranges(config: DecoderConfig, c: Compression) -> None:
    """Every range of layers holds some of this model's."""
    for number, some in enumerate(c.layers):
        if not any(some.holds(n, config.num_layers) for n in range(config.num_layers)):
            raise ValueError(
                f"layers.{number} is about layers {some.first} to "
                f"{'the last' if some.stop is None else some.stop - 1}, and holds none "
                f"of this model's {config.num_layers}. Change `first` and `stop`, or "
                "leave it out."
            )


def _protected(c: Compression, specs: tuple, lengths: np.ndarray) -> None:
    """Every row's budget holds what the score protects, in every layer."""
    evictions = [c.at(layer, len(specs)).evict for layer in range(len(specs))]
    for evict in dict.fromkeys(evictions):
        if evict is None:
            continue
        mine = [n for n, one in enumerate(evictions) if one == evict]
        budgets = [("evict.budget", evict.budget)]
        if evict.values is not None:
            budgets.append(("evict.values", evict.values))
        for name, budget in budgets:
            if budget.bytes is not None:
                continue  # depends on the stored width
            slots = budget.fewest(budget.counts(lengths, specs, slot_bytes=4.0))
            needed = evict.score.protected
            wanted = np.broadcast_to(np.minimum(needed, lengths), slots.shape)
            if c.schedule.interval is not None and budget.slots is not None:
                slots = np.full_like(slots, budget.slots)
                wanted = np.full_like(wanted, needed)
            short = (wanted - slots)[mine]
            at, row = np.unravel_index(np.argmax(short), short.shape)
            if short[at, row] > 0:
                layer = mine[at]
                raise ValueError(
                    f"{name} gives layer {layer} {int(slots[layer, row])} slots per "
                    f"head for the {int(lengths[row])} tokens of row {row}, but "
                    f"{type(evict.score).__name__} protects "
                    f"{int(wanted[layer, row])}. Raise the budget or lower the score's "
                    "window (evict.score.window)."
                )
