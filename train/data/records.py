"""One record of a dataset as tokens: plain text, a chat, or a question."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kvjax.messages import shown
from kvjax.plaintext import MARK
from kvjax.train.data.chats import chat, turn_end
from kvjax.train.data.example import (
    EMPTY,
    UNANSWERED,
    UNKNOWN,
    Example,
    Unusable,
    checked,
    example,
    fault,
)
from kvjax.train.data.words import Words
from kvjax.train.recipe import Source

Prepare = Callable[[Mapping[str, Any]], Example]


def preparation(source: Source, words: Words) -> Prepare:
    """What makes an example of a record of `source`.

    Raises:
        ValueError: chats, and a tokenizer without a chat template.
    """
    if source.text:
        prepare = functools.partial(plain, column=source.text, words=words)
    elif source.prompt:
        columns = (source.context, source.prompt, source.answer)
        prepare = functools.partial(question, columns=columns, words=words)
    elif getattr(words.tokenizer, "chat_template", None):
        prepare = functools.partial(
            chat, column=source.messages, words=words, tools=source.tools
        )
    else:
        raise ValueError(
            f"dataset {shown(source.dataset)} holds chats, and the tokenizer has no "
            "chat template. Start from a chat model, or use `prompt` and `answer`."
        )
    return functools.partial(readable, prepare=prepare, words=words)


def readable(record: Mapping[str, Any], *, prepare: Prepare, words: Words) -> Example:
    """The example of a record, if the tokenizer knows half of what it teaches."""
    made = prepare(record)
    taught = np.asarray(made["tokens"])[np.asarray(made["answers"], bool)]
    taught = taught[~np.isin(taught, (*words.begin, *words.end))]
    unknown = words.unknown(taught)
    if unknown and 2 * unknown >= len(taught):
        return fault(UNKNOWN, f"{unknown} of {len(taught)} tokens to learn")
    return made


def answer_end(source: Source, words: Words) -> int | None:
    """The token that the answers of a source end with; None: there is none."""
    if source.messages:
        return turn_end(words)
    return words.end[-1] if source.prompt and words.end else None


def plain(record: Mapping[str, Any], *, column: str, words: Words) -> Example:
    """A document with `<bos>` and `<eos>`, where the tokenizer has them."""
    text = _text(record, column)
    if not text.strip():
        return fault(EMPTY)
    try:
        tokens = np.concatenate([words.begin, words.encode(checked(text)), words.end])
    except Unusable as wrong:
        return fault(wrong.kind, str(wrong))
    return example(tokens, np.ones(len(tokens), bool), 0, 0)


def question(
    record: Mapping[str, Any], *, columns: tuple[str, str, str], words: Words
) -> Example:
    """Context, prompt and answer as they stand, each tokenized on its own.

    As in generation, where the answer's tokens come after those of the prompt. The
    text is not changed: a space between prompt and answer has to be in one of them.
    """
    context, prompt, answer = (_text(record, name) if name else "" for name in columns)
    if not answer.strip():
        return fault(UNANSWERED)
    if not (context + prompt).strip():
        return fault(EMPTY)
    try:
        pieces = [
            words.encode(checked(text), going_on=bool(before))
            for before, text in (
                ("", context),
                (context, prompt),
                (context + prompt, answer),
            )
        ]
    except Unusable as wrong:
        return fault(wrong.kind, str(wrong))
    tokens = np.concatenate([words.begin, *pieces, words.end])
    before = len(words.begin) + len(pieces[0])
    begin = before + len(pieces[1])
    answers = np.arange(len(tokens)) >= begin  # `<eos>` too: where to stop
    return example(tokens, answers, before if context else 0, begin)


def _text(record: Mapping[str, Any], column: str) -> str:
    """Text of a column, without the mark that some editors put before a text."""
    value = record[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(
            f"column {column!r} must hold text; got {type(value).__name__}: "
            f"{str(value)[:60]!r}."
        )
    return value.removeprefix(MARK)
