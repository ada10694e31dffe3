"""Tokens as the text that they stand for."""

from collections.abc import Sequence
from typing import Any

MOST = 8
"""Tokens that one character is split over, at most."""


def token_pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text of each token where it stands: joined, they are the whole text.

    A character that is split over several tokens stands with the first of them, and
    the others are empty. Special tokens stand by name.

    Args:
        tokenizer: a Hugging Face tokenizer.
        tokens: of one text.
    """

    def text(start: int, stop: int) -> str:
        some = [int(token) for token in tokens[start:stop]]
        return tokenizer.decode(some, clean_up_tokenization_spaces=False)

    # Many decoders drop the space before a text's first word, so that a token is read
    # together with what stands before it.
    pieces: list[str] = []
    before = start = 0
    for stop in range(1, len(tokens) + 1):
        known, now = text(before, start), text(before, stop)
        cut = now.endswith("\ufffd") and stop < len(tokens)
        if cut and stop - start < MOST:
            continue
        new = now[len(known) :] if now.startswith(known) else text(start, stop)
        pieces += [new, *[""] * (stop - start - 1)]
        before, start = start, stop
    return pieces
