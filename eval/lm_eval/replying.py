"""Replies for the harness, decoded from compressed caches."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from kvjax.eval.lm_eval.reader import Reader, Split
from kvjax.eval.text import Tokenizer
from kvjax.fields import Range, fit
from kvjax.messages import shown
from kvjax.models.generation import generate_from
from kvjax.models.inference import extend
from kvjax.models.sampling import Sampling

PIECE = 32
"""Tokens that are decoded before texts are looked at for stops of several tokens."""

_KNOWN = ("do_sample", "temperature", "top_k", "top_p", "until", "max_gen_toks")
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a reply is made.

    Attributes:
        sampling: how tokens are drawn.
        until: texts in front of which a reply ends.
        most: tokens of a reply.
    """

    sampling: Sampling
    until: tuple[str, ...]
    most: int


def settings(asked: Mapping[str, Any], most: int, eos: str | None) -> Settings:
    """What a task's `generation_kwargs` say.

    Args:
        asked: as the harness hands them over.
        most: tokens of a reply where they do not say.
        eos: text of the token that ends a reply.

    Raises:
        ValueError: they are not understood, or ask for what is not done here.
    """
    try:
        found: dict[str, Any] = dict(normalize_gen_kwargs(dict(asked), most))
        until = handle_stop_sequences(found["until"], eos)
        until = fit(until, tuple[str, ...], "until")
        others = {
            name: value
            for name, value in found.items()
            if name not in _KNOWN and _NEUTRAL.get(name) != value
        }
        if others:
            raise ValueError(f"{shown(others)} is not done here")
        return Settings(
            sampling=_sampling(found),
            until=tuple(text for text in until if text),
            most=fit(found["max_gen_toks"], Annotated[int, Range(1)], "max_gen_toks"),
        )
    except (TypeError, ValueError) as wrong:
        raise ValueError(
            f"generation_kwargs {shown(dict(asked))}: {str(wrong).rstrip('.')}. Known "
            f"are {', '.join(_KNOWN)}; correct those of the task."
        ) from wrong


def _sampling(found: Mapping[str, Any]) -> Sampling:
    if not found["do_sample"]:
        return Sampling()
    drawn: dict[str, Any] = {
        name: found.get(name) for name in ("temperature", "top_k", "top_p")
    }
    if not drawn["temperature"]:
        raise ValueError("do_sample needs a temperature above 0")
    if drawn["top_k"] == 0:  # as transformers says: all of them
        drawn["top_k"] = None
    return Sampling(**drawn)


class Replier:
    """Decodes replies.

    Args:
        reader: of the model and the compression.
        tokenizer: of the model.
        ends: tokens that end a reply and are no part of it.
    """

    def __init__(self, reader: Reader, tokenizer: Any, ends: Sequence[int]):
        self.reader, self.tokenizer, self.ends = reader, tokenizer, tuple(ends)
        self._texts = Tokenizer(tokenizer, reader.model.config.vocab_size)

    def reply(
        self,
        asked: Sequence[Split],
        how: Settings,
        key: Array,
        tell: Callable[[int, str], None],
    ) -> None:
        """A reply to each context.

        Args:
            asked: contexts; where one stands twice, each has a reply of its own.
            how: all of them are made.
            key: of drawing; consumed.
            tell: called with an index of `asked` and its reply, in any order.
        """
        stops = {t for text in how.until for t in self._texts.stops(text)} | {
            *self.ends
        }
        rows = min(self.reader.batch, len(asked))
        for batch in self.reader.batches([(split, how.most) for split in asked]):
            key, now = jax.random.split(key)
            splits = [asked[i] for i in batch]
            texts = self._decode(splits, rows, how, sorted(stops), now)
            for i, text in zip(batch, texts, strict=True):
                tell(i, text)

    def _decode(
        self,
        splits: Sequence[Split],
        rows: int,
        how: Settings,
        stops: Sequence[int],
        key: Array,
    ) -> list[str]:
        model, left = self.reader.model, how.most
        logits, cache = self.reader.read(splits, how.most, rows)
        made: list[list[int]] = [[] for _ in splits]
        going = set(range(len(splits)))
        while True:
            key, now = jax.random.split(key)
            out = generate_from(
                model,
                cache,
                logits,
                max_new_tokens=min(PIECE, left),
                **dataclasses.asdict(how.sampling),
                stop_tokens=stops,
                key=now,
            )
            tokens, counts = np.asarray(out.tokens), np.asarray(out.lengths)
            for row in tuple(going):
                made[row] += tokens[row, : counts[row]].tolist()
                if made[row][-1] in stops or self._stopped(made[row], how):
                    going.discard(row)
            left -= min(PIECE, left)
            if not left or not going:
                return [self._text(ids, how) for ids in made]
            # Rows that have stopped go on with the others; nobody looks at them.
            last = tokens[np.arange(rows), counts - 1]
            logits, cache = extend(model, out.cache, jnp.asarray(last[:, None]))
            logits = logits[:, 0]

    def _stopped(self, ids: Sequence[int], how: Settings) -> bool:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return any(stop in text for stop in how.until)

    def _text(self, ids: Sequence[int], how: Settings) -> str:
        kept = ids[:-1] if ids[-1] in self.ends else ids
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        return postprocess_generated_text(text, list(how.until), None)
