"""Between a task's characters and a model's tokens."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from kvjax.models.tokenizer import encoded

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""Of the SentencePiece kind, for a space."""


class Tokenizer:
    """A Hugging Face tokenizer as the harness uses it.

    Attributes:
        raw: the tokenizer itself.
        prefix: special tokens that the tokenizer puts before a text.
    """

    def __init__(self, tokenizer: Any, vocab_size: int):
        self.raw = tokenizer
        self._vocab_size = vocab_size
        bos: Any = tokenizer.bos_token_id
        begins = bos is not None and encoded(tokenizer, "a")[:1] == [bos]
        self.prefix: list[int] = [bos] if begins else []  # type: ignore[list-item]

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return bool(getattr(self.raw, "chat_template", None))

    @property
    def ends(self) -> tuple[int, ...]:
        """The token that ends a text, where there is one that the model knows."""
        end: Any = self.raw.eos_token_id
        return () if end is None or end >= self._vocab_size else (int(end),)

    def is_special(self, token: int) -> bool:
        """Whether a token stands for no text."""
        return token in self.raw.all_special_ids or (
            token in self.raw.added_tokens_decoder
            and self.raw.added_tokens_decoder[token].special
        )

    def encode(self, text: str) -> list[int]:
        """Tokens without specials."""
        return encoded(self.raw, text, add_special_tokens=False)

    def going_on(self, text: str) -> list[int]:
        """Tokens of a text behind another, without specials.

        Tokenizers of the SentencePiece kind put a space in front of what they are
        given: here it is not the beginning. Behind a line break, which they do not join
        with anything, there is none.
        """
        alone = self.encode(text)
        if not self._leads:
            return alone
        before, joined = self.encode("\n"), self.encode("\n" + text)
        return joined[len(before) :] if joined[: len(before)] == before else alone

    @functools.cached_property
    def _leads(self) -> bool:
        """Whether the tokenizer puts a space in front of a text."""
        pieces = self.raw.convert_ids_to_tokens(self.encode("a"))
        return bool(pieces) and str(pieces[0]).startswith(_SPACE)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without specials."""
        return self.raw.decode(
            [int(token) for token in tokens],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )

    def piece(self, token: int) -> str:
        """The text of one token, special ones by name."""
        return self.raw.decode([int(token)], clean_up_tokenization_spaces=False)

    @functools.cache  # noqa: B019 - lives as long as one run
    def stops(self, stop: str) -> tuple[int, ...]:
        """Every token whose text holds `stop`."""
        known = min(len(self.raw), self._vocab_size)
        return tuple(token for token in range(known) if stop in self.piece(token))

    def check(self, what: str, texts: Iterable[str]) -> None:
        """Every character has a token that the model knows.

        Raises:
            ValueError: names the characters that have none.
        """
        characters = sorted({character for text in texts for character in text})
        missing = "".join(c for c in characters if not self._knows(c))
        if missing:
            raise ValueError(
                f"{what} uses the characters {missing!r}, which this tokenizer and "
                f"model (vocabulary {self._vocab_size}) have no token for. Use another "
                "task or another model."
            )

    @functools.cache  # noqa: B019
    def _knows(self, character: str) -> bool:
        tokens = self.encode(character)
        unknown = self.raw.unk_token_id
        return bool(tokens) and all(
            token != unknown and 0 <= token < self._vocab_size for token in tokens
        )
