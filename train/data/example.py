"""A record that was read: its tokens, or why it gives no row."""

from collections.abc import Mapping
from typing import Any, TypedDict

import numpy as np

from kvjax.plaintext import check_text
from kvjax.train.data.rows import TokenRow

EMPTY = "empty"
UNANSWERED = "without an answer"
NO_TEXT = "with characters that are none"
UNKNOWN = "with mostly characters that the tokenizer does not know"


class Example(TypedDict):
    """A record that was read; the columns of a prepared dataset.

    `fault` says why the record gives no row, `why` more of it; both are empty where it
    does. The rest is as in `TokenRow`.
    """

    tokens: np.ndarray
    answers: np.ndarray
    context: int
    prompt: int
    fault: str
    why: str


class Unusable(ValueError):
    """A record that gives no row, for a reason that is counted."""

    def __init__(self, kind: str, why: str):
        super().__init__(why)
        self.kind = kind


def checked(text: str) -> str:
    """`text`, which a tokenizer can read.

    Raises:
        Unusable: it has characters that are none.
    """
    try:
        check_text(text, "its text")
    except ValueError as wrong:
        raise Unusable(NO_TEXT, str(wrong)) from None
    return text


def example(tokens: Any, answers: np.ndarray, context: int, prompt: int) -> Example:
    """A record that gives a row."""
    return Example(
        tokens=np.asarray(tokens, np.int32),
        answers=answers,
        context=context,
        prompt=prompt,
        fault="",
        why="",
    )


def fault(kind: str, why: str = "") -> Example:
    """A record that gives none."""
    none = np.zeros(0, np.int32)
    return Example(
        tokens=none,
        answers=none.astype(bool),
        context=0,
        prompt=0,
        fault=kind,
        # Libraries repeat what they were given, which Arrow cannot keep.
        why=why[:400].encode("utf-8", "backslashreplace").decode(),
    )


def as_row(record: Mapping[str, Any]) -> TokenRow:
    """The row of an example, its loss on answers only."""
    answers = np.asarray(record["answers"], bool)
    return TokenRow(
        tokens=np.asarray(record["tokens"], np.int32),
        weights=answers.astype(np.float32),
        answers=answers,
        context=int(record["context"]),
        prompt=int(record["prompt"]),
    )
