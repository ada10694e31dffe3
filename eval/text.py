"""Between a task's characters and a model's tokens."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from kvjax.models.tokenizer import encoded


class Tokenizer:
    """A Hugging Face tokenizer as the harness uses it.

    Attributes:
        prefix: special tokens that the tokenizer puts before a text.
    """

    def __init__(self, tokenizer: Any, vocab_size: int):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        bos: Any = tokenizer.bos_token_id
        begins = bos is not None and encoded(tokenizer, "a")[:1] == [bos]
        self.prefix: list[int] = [bos] if begins else []  # type: ignore[list-item]

    def encode(self, text: str) -> list[int]:
        """Tokens without specials."""
        return encoded(self._tokenizer, text, add_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without specials."""
        return self._tokenizer.decode(
            [int(token) for token in tokens],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )

    def piece(self, token: int) -> str:
        """The text of one token, special ones by name."""
        return self._tokenizer.decode([int(token)], clean_up_tokenization_spaces=False)

    @functools.cache  # noqa: B019 - lives as long as one run
    def stops(self, stop: str) -> tuple[int, ...]:
        """Every token whose text holds `stop`."""
        known = min(len(self._tokenizer), self._vocab_size)
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
        unknown = self._tokenizer.unk_token_id
        return bool(tokens) and all(
            token != unknown and 0 <= token < self._vocab_size for token in tokens
        )
