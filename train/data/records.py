"""One record of a dataset as tokens: plain text, a chat, or a question."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import jinja2
import numpy as np

from kvjax.messages import nearest
from kvjax.train.data.rows import TokenRow
from kvjax.train.data.words import Words
from kvjax.train.recipe import Source

EMPTY = "empty"
UNANSWERED = "without an answer"
REFUSED = "refused by the chat template"
REWRITTEN = "with answers that the chat template changes later"
MARKED = re.compile(r"{%-?\s*generation\s*-?%}")


class Example(TypedDict):
    """A record that was read; the columns of a prepared dataset.

    `fault` says why the record gives no row, and is empty where it does. The rest is
    as in `TokenRow`.
    """

    tokens: np.ndarray
    answers: np.ndarray
    context: int
    prompt: int
    fault: str


Prepare = Callable[[Mapping[str, Any]], Example]


def preparation(source: Source, words: Words) -> Prepare:
    """What makes an example of a record of `source`.

    Raises:
        ValueError: chats, and a tokenizer without a chat template.
    """
    if source.text:
        return functools.partial(plain, column=source.text, words=words)
    if source.prompt:
        columns = (source.context, source.prompt, source.answer)
        return functools.partial(question, columns=columns, words=words)
    if not getattr(words.tokenizer, "chat_template", None):
        raise ValueError(
            f"dataset {source.dataset!r} holds chats, and the tokenizer has no chat "
            "template. Start from a chat model, or use `prompt` and `answer`."
        )
    return functools.partial(chat, column=source.messages, words=words)


def plain(record: Mapping[str, Any], *, column: str, words: Words) -> Example:
    """A document with `<bos>` and `<eos>`, where the tokenizer has them."""
    text = _text(record, column)
    if not text.strip():
        return _fault(EMPTY)
    tokens = np.concatenate([words.begin, words.encode(text), words.end])
    return _example(tokens, np.ones(len(tokens), bool), 0, 0)


def question(
    record: Mapping[str, Any], *, columns: tuple[str, str, str], words: Words
) -> Example:
    """Context, prompt and answer as they stand, each tokenized on its own.

    As in generation, where the answer's tokens come after those of the prompt. The
    text is not changed: a space between prompt and answer has to be in one of them.
    """
    context, prompt, answer = (_text(record, name) if name else "" for name in columns)
    if not answer.strip():
        return _fault(UNANSWERED)
    if not (context + prompt).strip():
        return _fault(EMPTY)
    pieces = [words.encode(text) for text in (context, prompt, answer)]
    tokens = np.concatenate([words.begin, *pieces, words.end])
    before = len(words.begin) + len(pieces[0])
    begin = before + len(pieces[1])
    answers = np.arange(len(tokens)) >= begin  # `<eos>` too: where to stop
    return _example(tokens, answers, before if context else 0, begin)


def chat(record: Mapping[str, Any], *, column: str, words: Words) -> Example:
    """A chat as the tokenizer's own template writes it, up to its last answer.

    Answers are what a template marks with `{% generation %}`; else what stands between
    the prompt for an answer and the end of the chat cut behind it, end of turn
    included. Chats in which these cannot be told, since the template writes earlier
    answers anew, give no row.
    """
    messages = _messages(record, column)
    roles = [message["role"] for message in messages]
    if not messages:
        return _fault(EMPTY)
    if "assistant" not in roles:
        return _fault(UNANSWERED)
    last = max(i for i, role in enumerate(roles) if role == "assistant")
    try:
        return _chat(messages[: last + 1], words)
    except jinja2.TemplateError:
        return _fault(REFUSED)


def _chat(messages: Sequence[dict[str, Any]], words: Words) -> Example:
    template = words.tokenizer.apply_chat_template
    render = functools.partial(template, tokenize=False)
    whole: Any = render(messages)
    tokens = words.encode(whole)
    if MARKED.search(str(words.tokenizer.chat_template)):
        marked = template(messages, return_dict=True, return_assistant_tokens_mask=True)
        answers = np.asarray(marked["assistant_masks"], bool)
    else:
        answers = np.zeros(len(tokens), bool)
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked: Any = render(messages[:i], add_generation_prompt=True)
            first = _shared(words.encode(asked), tokens)
            behind = _shared(words.encode(render(messages[: i + 1])), tokens)
            if not whole.startswith(asked) or behind <= first:
                return _fault(REWRITTEN)
            answers[first:behind] = True
    if not answers.any():
        return _fault(UNANSWERED)
    # The last run of answer tokens begins behind the last token that is none.
    final = int(np.flatnonzero(answers)[-1])
    prompt = final - int(np.argmin(answers[final::-1])) + 1
    asks = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=0)
    before = _shared(words.encode(render(messages[:asks])), tokens) if asks else 0
    return _example(tokens, answers, min(before, prompt), prompt)


def _shared(one: np.ndarray, two: np.ndarray) -> int:
    """Tokens that two sequences begin with."""
    least = min(len(one), len(two))
    return int(np.argmin(np.append(one[:least] == two[:least], False)))


def as_row(example: Mapping[str, Any]) -> TokenRow:
    """The row of an example, its loss on answers only."""
    answers = np.asarray(example["answers"], bool)
    return TokenRow(
        tokens=np.asarray(example["tokens"], np.int32),
        weights=answers.astype(np.float32),
        answers=answers,
        context=int(example["context"]),
        prompt=int(example["prompt"]),
    )


def _example(tokens, answers: np.ndarray, context: int, prompt: int) -> Example:
    return Example(
        tokens=np.asarray(tokens, np.int32),
        answers=answers,
        context=context,
        prompt=prompt,
        fault="",
    )


def _fault(why: str) -> Example:
    none = np.zeros(0, np.int32)
    return Example(
        tokens=none, answers=none.astype(bool), context=0, prompt=0, fault=why
    )


def _text(record: Mapping[str, Any], column: str) -> str:
    value = record[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(
            f"column {column!r} must hold text; got {type(value).__name__}: "
            f"{str(value)[:60]!r}."
        )
    return value


def _messages(record: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    value = record[column] if record[column] is not None else []
    if not isinstance(value, list) or not all(isinstance(m, Mapping) for m in value):
        raise ValueError(
            f"column {column!r} must hold lists of messages; got "
            f"{type(value).__name__}: {str(value)[:60]!r}."
        )
    for message in value:
        for key in ("role", "content"):
            if key not in message:
                raise ValueError(
                    f"messages of column {column!r} need `role` and `content`; got "
                    f"{sorted(message)}.{nearest(key, message)} Rename them with "
                    "`Dataset.map` first."
                )
    # Columns of a dataset are filled up with None; templates want the key gone.
    return [{k: v for k, v in m.items() if v is not None} for m in value]
