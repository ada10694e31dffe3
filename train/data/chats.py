"""A chat as tokens: what its template writes, and which of it is answer."""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvjax.messages import nearest
from kvjax.models.templates import TemplateFault, written
from kvjax.plaintext import MARK
from kvjax.train.data.example import (
    EMPTY,
    UNANSWERED,
    Example,
    Unusable,
    checked,
    example,
    fault,
)
from kvjax.train.data.words import Words

REFUSED = "refused by the chat template"
REWRITTEN = "with answers that the chat template changes later"
MALFORMED = "with messages that are none"
MARKED = re.compile(r"{%-?\s*generation\s*-?%}")

PROBE = (
    {"role": "system", "content": "instruction"},
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "answer"},
)


def chat(
    record: Mapping[str, Any], *, column: str, words: Words, tools: str = ""
) -> Example:
    """A chat as the tokenizer's own template writes it, up to its last answer.

    Answers are what a template marks with `{% generation %}`; else what stands between
    the prompt for an answer and the end of the chat cut behind it, end of turn
    included. Chats in which these cannot be told, since the template writes earlier
    answers anew, give no row.

    Raises:
        ValueError: the column holds no chats; a template that never ends.
    """
    listed = _listed(record[column], column)
    if not listed:
        return fault(EMPTY)
    try:
        messages = [_message(*numbered) for numbered in enumerate(listed, 1)]
        schemas = _tools(record[tools], tools) if tools else None
        roles = [message["role"] for message in messages]
        if "assistant" not in roles:
            return fault(UNANSWERED)
        last = max(i for i, role in enumerate(roles) if role == "assistant")
        return _chat(messages[: last + 1], words, schemas)
    except Unusable as wrong:
        return fault(wrong.kind, str(wrong))
    except TemplateFault as wrong:
        return fault(REFUSED, str(wrong))


def turn_end(words: Words) -> int | None:
    """The special token that every answer of a chat ends with; None: there is none.

    It is the last token of what is trained as answer, space behind it aside.
    """
    made = chat({"": list(PROBE[1:])}, column="", words=words)
    if made["fault"]:  # some templates want a system's message
        made = chat({"": list(PROBE)}, column="", words=words)
    tokens = np.asarray(made["tokens"])[np.asarray(made["answers"], bool)]
    specials = set(words.tokenizer.all_special_ids) | {
        number
        for number, token in words.tokenizer.added_tokens_decoder.items()
        if token.special
    }
    for count, token in enumerate(map(int, tokens[::-1])):
        if token in specials:
            return token
        if words.tokenizer.decode(tokens[len(tokens) - count - 1 :]).strip():
            return None
    return None


def _chat(
    messages: Sequence[dict[str, Any]], words: Words, tools: list[Any] | None
) -> Example:
    render = functools.partial(written, words.tokenizer, tools=tools)
    whole = checked(render(messages))
    tokens = words.encode(whole)
    if MARKED.search(words.tokenizer.get_chat_template(tools=tools)):
        answers = _marked(messages, words, tools)
    else:
        answers = np.zeros(len(tokens), bool)
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = render(messages[:i], ask=True)
            first = _shared(words.encode(asked), tokens)
            behind = _shared(words.encode(render(messages[: i + 1])), tokens)
            if not whole.startswith(asked) or behind <= first:
                return fault(REWRITTEN, f"message {i + 1}")
            answers[first:behind] = True
    if not answers.any():
        return fault(UNANSWERED)
    # The last run of answer tokens begins behind the last token that is none.
    final = int(np.flatnonzero(answers)[-1])
    prompt = final - int(np.argmin(answers[final::-1])) + 1
    asks = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=0)
    before = _shared(words.encode(render(messages[:asks])), tokens) if asks else 0
    return example(tokens, answers, min(before, prompt), prompt)


def _marked(
    messages: Sequence[dict[str, Any]], words: Words, tools: list[Any] | None
) -> np.ndarray:
    found: Any = words.tokenizer.apply_chat_template(
        list(messages),
        tools=tools or None,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return np.asarray(found["assistant_masks"], bool)


def _shared(one: np.ndarray, two: np.ndarray) -> int:
    """Tokens that two sequences begin with."""
    least = min(len(one), len(two))
    return int(np.argmin(np.append(one[:least] == two[:least], False)))


def _listed(value: Any, column: str) -> list[Mapping[str, Any]]:
    """The messages of a chat, unless it is plain that the column has others."""
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(m, Mapping) for m in value):
        raise ValueError(
            f"column {column!r} must hold lists of messages; got "
            f"{type(value).__name__}: {str(value)[:60]!r}."
        )
    for key in ("role", "content") if value else ():
        least = min(value, key=len)
        other = set().union(*value) - {"role", "content", "tool_calls"}
        if not any(key in message for message in value) and other:
            raise ValueError(
                f"messages of column {column!r} need `role` and `content`; got "
                f"{sorted(map(str, least))[:20]}.{nearest(key, map(str, least))} "
                "Rename them with `Dataset.map` first."
            )
    return value


def _message(number: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates take it: without keys that are None, its content text."""
    # Columns of a dataset are filled up with None; templates want the key gone.
    message = {str(key): value for key, value in given.items() if value is not None}
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise Unusable(
            MALFORMED, f"message {number}: the role must be text; {_is(role)}"
        )
    if "content" in message:
        message["content"] = _content(number, message["content"])
    elif not message.get("tool_calls"):
        raise Unusable(MALFORMED, f"message {number} ({role[:20]}) has no content")
    return message


def _content(number: int, value: Any) -> str:
    """Text, or the parts of one."""
    if isinstance(value, str):
        return value.removeprefix(MARK)
    if not isinstance(value, list):
        said = f"message {number}: the content must be text; {_is(value)}"
        raise Unusable(MALFORMED, said)
    texts = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            what = f"of type {str(kind)[:20]!r}" if kind else _is(part)
            said = f"message {number}: the parts of a content must be text; {what}"
            raise Unusable(MALFORMED, said)
        texts.append(text)
    return "".join(texts)


def _tools(value: Any, column: str) -> list[Any] | None:
    """What an assistant may call, as the library takes it."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as wrong:
            said = f"column {column!r} is text that is no JSON: {wrong}"
            raise Unusable(MALFORMED, said) from None
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(x, Mapping) for x in value):
        said = f"column {column!r} must hold lists of JSON schemas; {_is(value)}"
        raise Unusable(MALFORMED, said)
    return [dict(one) for one in value]


def _is(value: Any) -> str:
    return f"it is {type(value).__name__}: {str(value)[:40]!r}"
