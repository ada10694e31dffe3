"""Texts of the harness as tokens of a model, and chats as texts."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvjax.messages import shown
from kvjax.models.config import DecoderConfig
from kvjax.models.templates import TemplateFault, written
from kvjax.models.tokenizer import encoded


class Words:
    """A tokenizer as the harness's own models use one.

    Attributes:
        ends: tokens that end a reply.
    """

    def __init__(self, tokenizer: Any, config: DecoderConfig):
        if not callable(getattr(tokenizer, "encode", None)):
            raise ValueError(
                "`tokenizer` must be that of the model, as `kvjax.load` returns it; "
                f"got {shown(tokenizer)}."
            )
        self._tokenizer, self._size = tokenizer, config.vocab_size
        found = (getattr(tokenizer, "eos_token_id", None), *config.eos_tokens)
        known = [token for token in found if token is not None and token < self._size]
        self.ends: tuple[int, ...] = tuple(dict.fromkeys(known))

    @property
    def end(self) -> int:
        """The token that ends a text."""
        if not self.ends:
            raise ValueError(
                "neither the tokenizer nor the model has an end token, which the "
                "harness puts in front of texts. Set the tokenizer's eos_token."
            )
        return self.ends[0]

    @property
    def begin(self) -> int:
        """The token in front of a text that has no context."""
        own = getattr(self._tokenizer, "bos_token_id", None)
        return self.end if own is None else own

    def encode(self, text: str, specials: bool | None = None) -> list[int]:
        """Tokens of a text.

        Args:
            text: may begin with the token that a tokenizer puts in front; there is no
                second one then.
            specials: whether special tokens are added; None: as the tokenizer does.
        """
        begins = self.ends or getattr(self._tokenizer, "bos_token_id", None) is not None
        if specials is None and begins:
            first = self._tokenizer.decode([self.begin])
            specials = False if first and text.startswith(first) else None
        how = {} if specials is None else {"add_special_tokens": specials}
        ids = encoded(self._tokenizer, text, **how)
        if ids and max(ids) >= self._size:
            raise ValueError(
                f"the tokenizer gives token {max(ids)} for {shown(text)}, and the "
                f"model knows {self._size}. Use the model's own tokenizer."
            )
        return ids

    def chat(self, messages: Sequence[Mapping[str, str]], ask: bool) -> str:
        """A chat as the template writes it.

        Args:
            messages: with roles and contents.
            ask: for another answer; else the last message is to be continued.
        """
        try:
            chat = [dict(message) for message in messages]
            return written(self._tokenizer, chat, ask=ask, go_on=not ask)
        except TemplateFault as wrong:
            raise ValueError(
                f"the model's chat template refuses what a task asks ({wrong}). Leave "
                "apply_chat_template or system_instruction out."
            ) from wrong
