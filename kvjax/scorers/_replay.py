"""Prompts that are told again, chunk by chunk, behind themselves."""

import dataclasses
from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kvjax.config import sized
from kvjax.fields import Range, Size, Token
from kvjax.scorers.base import AbstractProbe
from kvjax.types import EMPTY, Lengths, Tokens, pytree


@pytree
class Retold:
    """One chunk of every prompt, and the tokens behind the prompt that tell it again.

    Attributes:
        index: `[C]` places of the chunk in the prompts; some may lie behind their end.
        tokens: `[B, R]`, right-padded.
        positions: `[B, R]` of them, `EMPTY` at padding.
        own: `[B, R]` which of them are the chunk's.
    """

    index: Int[Array, "C"]
    tokens: Int[Array, "B R"]
    positions: Int[Array, "B R"]
    own: Bool[Array, "B R"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractReplay(AbstractProbe):
    """A score of what the model does when it tells the prompt again.

    The prompt is cut in chunks. Each is told behind the whole prompt, after what asks
    for it and the end of the chunk before. A replay takes positions behind the prompt.

    Attributes:
        chunk: tokens that are told at a time; the last chunk is the rest.
        overlap: last tokens of the chunk before that lead a later chunk in.
        ask: token ids in front of each replay, a tokenizer's `Repeat the previous
            context exactly.`, say; empty: the prompt simply begins again.
    """

    chunk: Size = sized(2048, short=32)
    overlap: Annotated[int, Range(0, 2**16)] = 8
    ask: tuple[Token, ...] = ()

    def validate(self, longest, vocab_size, max_positions):
        if max(self.ask, default=0) >= vocab_size:
            raise ValueError(
                f"`ask` must be ids of the model's {vocab_size} tokens; got "
                f"{max(self.ask)}. Encode it with the model's own tokenizer."
            )
        chunk = min(self.chunk, longest)
        lead = self.overlap if longest > self.chunk else 0
        end = longest + len(self.ask) + min(lead, chunk) + chunk
        if end > max_positions:
            raise ValueError(
                f"{type(self).__name__} tells {chunk} tokens at a time behind a prompt "
                f"of {longest}, up to position {end}; the model's range is "
                f"{max_positions}. Lower `evict.score.chunk` (now {self.chunk}), or "
                "shorten the prompt."
            )

    def chunks(self, width: int) -> Int[Array, "chunks"]:
        """Numbers of the chunks of prompts that are `width` wide."""
        return jnp.arange(-(-width // self.chunk), dtype=jnp.int32)

    def retold(
        self, number: Int[Array, ""], tokens: Tokens, lengths: Lengths
    ) -> Retold:
        """One chunk; rows that end before it have padding alone.

        Args:
            number: of the chunk.
            tokens: the prompts.
            lengths: of each row.
        """
        width, asked = tokens.shape[1], len(self.ask)
        size = min(self.chunk, width)
        start = number * self.chunk
        before = jnp.where(number > 0, min(self.overlap, self.chunk), 0)
        most = 0 if width <= self.chunk else min(self.overlap, self.chunk)
        place = jnp.arange(asked + most + size, dtype=jnp.int32)
        source = place - asked - before + start
        end = jnp.minimum(lengths, start + size)[:, None]
        live = (lengths[:, None] > start) & ((source < end) | (place < asked))
        told = jnp.take(tokens, jnp.clip(source, 0, width - 1), axis=1)
        if asked:
            ask = jnp.asarray(self.ask, jnp.int32)[jnp.minimum(place, asked - 1)]
            told = jnp.where(place < asked, ask, told)
        return Retold(
            index=start + jnp.arange(size, dtype=jnp.int32),
            tokens=jnp.where(live, told, 0),
            positions=jnp.where(live, lengths[:, None] + place, EMPTY),
            own=live & (source >= start) & (place >= asked),
        )
