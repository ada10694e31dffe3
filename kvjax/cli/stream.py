"""Replies as they grow, on a terminal or in a pipe."""

from collections.abc import Sequence

import numpy as np


class Stream:
    """Prints a reply as it grows; characters are held back until they are whole."""

    def __init__(self, tokenizer, file, *, quiet: bool):
        self._tokenizer, self._file, self._quiet = tokenizer, file, quiet
        self._printed, self._text = 0, ""

    def __call__(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Print what is new."""
        ids: Sequence[int] = tokens[0, : int(lengths[0])].tolist()
        self._text = self._tokenizer.decode(ids, skip_special_tokens=True)
        # A byte-level token may end inside a character.
        self._print(len(self._text.rstrip("\ufffd")))

    def close(self) -> None:
        """Print what was held back."""
        self._print(len(self._text))

    def _print(self, end: int) -> None:
        if not self._quiet and end > self._printed:
            self._file.write(self._text[self._printed : end])
            self._file.flush()
            self._printed = end
