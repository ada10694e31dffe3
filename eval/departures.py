"""When each token left a cache that evicts while decoding."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kvjax.cache import KVCache
from kvjax.compress.config import Compression
from kvjax.eval.replies import ask
from kvjax.fields import Positive
from kvjax.messages import shown
from kvjax.models import checks
from kvjax.models.decoder import Decoder
from kvjax.models.finite import check_rows
from kvjax.models.inference import extend, prefill
from kvjax.types import LengthsLike, TokensLike

STAYED = -1
"""Of a token that was held to the end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Departures:
    """When each token of one row left the cache.

    Time is the number of tokens read behind the prompt: 0 is the compression of the
    prompt itself.

    Attributes:
        tokens: ids of the prompt and of what was read behind it.
        prompt: tokens of the prompt.
        times: when the cache was looked at, from 0 on.
        left: per layer `[K, S]`, the first of `times` at which a head held the token no
            more; -1 if it held it to the end.
    """

    tokens: np.ndarray
    prompt: int
    times: tuple[int, ...]
    left: tuple[np.ndarray, ...]

    def held(self, time: int) -> np.ndarray:
        """Share of all heads that held each token at a time; 0 before it was read."""
        left = np.concatenate(self.left)
        share = ((left == STAYED) | (left > time)).mean(axis=0)
        return np.where(np.arange(share.size) < self.prompt + time, share, 0.0)


def evicts_later(c: Compression) -> bool:
    """Whether tokens leave while decoding, too."""
    return c.schedule.interval is not None


def departures(
    model: Decoder,
    tokens: TokensLike,
    c: Compression,
    *,
    steps: Positive = 64,
    follow: Any = None,
) -> Departures:
    """When each token left, of a prompt and of what came after it.

    Args:
        model: a decoder.
        tokens: `[T]` or `[1, T]`, the prompt.
        c: the compression.
        steps: tokens that are read behind the prompt, one at a time.
        follow: `[N]` tokens that are read, at least `steps`; None: what the model
            itself makes of the prompt, greedily.

    Raises:
        ValueError: see `kvjax.prefill`; several rows; `follow` is too short.

    Cost: a decode step per token, and the positions of all layers on the host.
    """
    rows = np.asarray(tokens)
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or len(rows) != 1:
        raise ValueError(
            f"`tokens` must be those of one prompt, [T] or [1, T]; got {shown(tokens)}."
        )
    checks.count("steps", steps, 1)
    told = None if follow is None else np.asarray(follow).reshape(1, -1)
    if told is not None and told.shape[1] < steps:
        raise ValueError(
            f"`follow` has {told.shape[1]} tokens, and `steps` is {steps}. Give more, "
            "or lower `steps`."
        )
    logits, cache = prefill(model, rows, None, c, max_new_tokens=steps + 1)
    watch = Watch(cache, 0, rows[0])
    read_on(model, cache, logits, watch, steps=steps, told=told)
    return watch.seen()


class Watch:
    """Looks at one row of a cache again and again, and notes what is missing.

    Args:
        cache: of the prompts, compressed.
        row: of the batch.
        prompt: the row's tokens.
    """

    def __init__(self, cache: KVCache, row: int, prompt: Any):
        self.row, self.tokens = row, [int(token) for token in prompt]
        self.prompt, self.times = len(self.tokens), []
        heads = [len(cache.kept_positions(i)[row]) for i in range(cache.num_layers)]
        self.left = [np.zeros((head, 0), np.int64) for head in heads]
        self.look(cache, ())

    def look(self, cache: KVCache, tokens: Any) -> None:
        """After it has read `tokens`; without any, only at the start."""
        if self.times and not len(tokens):
            return
        self.tokens += [int(token) for token in tokens]
        time, count = len(self.tokens) - self.prompt, len(self.tokens)
        for layer, old in enumerate(self.left):
            new = [(0, 0), (0, count - old.shape[1])]
            left = np.pad(old, new, constant_values=STAYED)
            for mine, positions in zip(
                left, cache.kept_positions(layer)[self.row], strict=True
            ):
                held = np.zeros(count, bool)
                held[positions] = True
                mine[~held & (mine == STAYED)] = time
            self.left[layer] = left
        self.times.append(time)

    def seen(self) -> Departures:
        """What was noted so far."""
        return Departures(
            tokens=np.array(self.tokens),
            prompt=self.prompt,
            times=tuple(self.times),
            left=tuple(self.left),
        )


def read_on(
    model: Decoder,
    cache: KVCache,
    logits: Float[Array, "B V"],
    watch: Watch,
    *,
    steps: int,
    asked: tuple[TokensLike, LengthsLike] | None = None,
    told: Any = None,
    width: int = 1,
    stops: tuple[int, ...] = (),
) -> None:
    """Read on behind the prompts of a batch, watched.

    Args:
        model: a decoder.
        cache: of the prompts, with room for all that is read.
        logits: of each prompt's last token.
        watch: looks at one row.
        steps: how often it is read, at most.
        asked: right-padded `[B, T]` and lengths, read first in one call.
        told: `[B, N]` tokens that are read then; None: the likeliest ones.
        width: tokens of a step; more than 1 only for `told`.
        stops: tokens that end it, in the watched row.
    """
    row = watch.row
    if asked is not None:
        logits, cache = ask(model, cache, *asked)
        tokens, lengths = (np.asarray(side)[row] for side in asked)
        watch.look(cache, tokens[:lengths])
    for step in range(steps):
        some = np.asarray(jnp.argmax(logits, axis=-1))[:, None]
        if told is None:
            check_rows(model.dtype, jnp.isfinite(jnp.max(logits, axis=-1)))
        else:
            some = np.asarray(told)[:, step * width :][:, :width]
        if some.shape[1] < width or (told is None and int(some[row, 0]) in stops):
            return
        every, cache = extend(model, cache, jnp.asarray(some, jnp.int32))
        logits = every[:, -1]
        watch.look(cache, some[row])
