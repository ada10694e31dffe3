"""Replies from a compressed cache: a question is read through it, a reply decoded."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kvjax.cache import KVCache
from kvjax.eval.timing import timed
from kvjax.models.decoder import Decoder
from kvjax.models.generation import generate_from
from kvjax.models.inference import extend
from kvjax.types import LengthsLike, TokensLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replies:
    """What a batch of caches replied, and the time that took.

    Attributes:
        tokens: per row, its new tokens; the stop token is among them.
        decode_s: wall time of decoding, compilation aside.
        steps: decode steps that ran.
        compile_s: time spent compiling.
    """

    tokens: tuple[np.ndarray, ...]
    decode_s: float
    steps: int
    compile_s: float


def greedy_replies(
    model: Decoder,
    cache: KVCache,
    logits: Float[Array, "B V"],
    questions: tuple[TokensLike, LengthsLike] | None = None,
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
) -> Replies:
    """The likeliest reply of each row of a cache, which stays as it is.

    Args:
        model: the decoder that made the cache.
        cache: of prompts, with room for question and reply.
        logits: of each prompt's last token. They do not know the compression, and
            nothing comes of them where a question follows.
        questions: right-padded `[B, T]` tokens, at least one per row, and their
            lengths; None where the prompts hold the questions.
        max_new_tokens: tokens of a reply, at most.
        stop_tokens: ids that end a reply.

    Raises:
        ValueError: see `extend` and `generate_from`.
    """
    compile_s = 0.0
    if questions is not None:
        tokens, lengths = questions
        asked = timed(lambda: ask(model, cache, tokens, lengths))
        (logits, cache), compile_s = asked.value, asked.compile_s
    decoded = timed(
        lambda: generate_from(
            model,
            cache,
            logits,
            max_new_tokens=max_new_tokens,
            stop_tokens=stop_tokens,
        )
    )
    made, counts = np.asarray(decoded.value.tokens), np.asarray(decoded.value.lengths)
    return Replies(
        tokens=tuple(row[:count] for row, count in zip(made, counts, strict=True)),
        decode_s=decoded.run_s,
        # The first token needs no step: its logits were there.
        steps=int(counts.max()) - 1,
        compile_s=compile_s + decoded.compile_s,
    )


def ask(
    model: Decoder, cache: KVCache, questions: TokensLike, lengths: LengthsLike
) -> tuple[Float[Array, "B V"], KVCache]:
    """Logits of each question's last token, and the cache after it.

    Arguments and errors are those of `extend`.
    """
    tokens, lengths = jnp.asarray(questions), jnp.asarray(lengths)
    logits, cache = extend(model, cache, tokens, lengths, last=True)
    return logits[:, 0], cache
