"""Chats that templates do not take as they are: parts, tools, faults, endless ones."""

import json
import logging
import re
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvjax.models import templates
from kvjax.train.data.chats import MALFORMED, REFUSED, chat, turn_end
from kvjax.train.data.example import NO_TEXT
from kvjax.train.data.tokenizer import build_tokenizer
from kvjax.train.data.words import Words
from kvjax.train.recipe import Source, Stage
from tests.train.datasets_samples import (
    CHATML,
    ENDED,
    MARKED,
    chat_words,
    mixture,
    said,
    write_jsonl,
)

pytestmark = pytest.mark.usefixtures("datasets_cache")

STAGES = (Stage(steps=9, lengths={256: 1.0}, tokens_per_step=512),)

CALLS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}.\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
JOINS = CHATML.replace("{{ m['content'] }}", "{{ '' + m['content'] }}")
ENDLESS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
)


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


def called(name: str, **arguments) -> dict:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def schema(name: str, **properties: str) -> dict:
    kinds = {key: {"type": kind} for key, kind in properties.items()}
    return {"name": name, "parameters": {"type": "object", "properties": kinds}}


USES = [
    {
        "m": [*said("add 1 and 2"), called("add", x=1, y=2), *said("3", "three")],
        "tools": [schema("add", x="number", y="number")],
    },
    {
        "m": [*said("weather"), called("weather", city="rome"), *said("?", "sunny")],
        "tools": [schema("weather", city="string")],
    },
]


@pytest.mark.parametrize("template", [CHATML, JOINS, MARKED])
def test_parts_that_are_text_are_one_text(template):
    words = chat_words(template)
    given = said("hi", "hello")
    given[0]["content"], given[1]["content"] = parts("h", "i"), [{"text": "hello"}]
    example = chat({"m": given}, column="m", words=words)
    want = chat({"m": said("hi", "hello")}, column="m", words=words)
    np.testing.assert_array_equal(example["tokens"], want["tokens"])
    np.testing.assert_array_equal(example["answers"], want["answers"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"content": [*parts("a"), {"type": "image_url", "image_url": {}}]},
            "image_url",
        ),
        ({"content": ["a", "b"]}, "parts of a content must be text; it is str: 'a'"),
        ({"content": [parts("a")]}, "parts of a content must be text; it is list"),
        ({"content": [{"type": "text", "text": 3}]}, "must be text; of type 'text'"),
        ({"content": 3}, "the content must be text; it is int: '3'"),
        ({"content": {"text": "a"}}, "the content must be text; it is dict"),
        ({"content": None}, r"message 1 \(user\) has no content"),
        ({"role": 7}, "the role must be text; it is int: '7'"),
        ({"role": None}, "the role must be text; it is NoneType"),
        ({"role": ["user"]}, "the role must be text; it is list"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_messages_that_are_none_are_left_out_by_row(
    tmp_path, change, message, streaming, caplog
):
    bad = said("hi", "hello")
    bad[0] |= change
    path = write_jsonl(tmp_path / "a.jsonl", [{"m": said("a", "b")}, {"m": bad}])
    source = Source(dataset=path, messages="m", streaming=streaming)
    with caplog.at_level(logging.WARNING, logger="kvjax.train"):
        one = mixture(source, words=chat_words())
        one.batch(0)
    assert one.readers[0][1].skipped == {MALFORMED: 1}
    (first,) = one.readers[0][1].left_out.first.values()
    assert "a.jsonl, line 2: message 1" in first and first in caplog.text
    assert re.search(message, first)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[9].role + 1 }}", "UndefinedError"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% if", "TemplateSyntaxError"),
        ("{% for i in range(999999999) %}{{ i }}{% endfor %}", "Range too big"),
        ("{{ 10**(10**9) }}", "`\\*\\*`, a step that may never end"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ ('a' * 9999) * 9999 }}", "99980001 characters; at most"),
    ],
)
def test_a_template_that_raises_is_told_in_its_own_words(tmp_path, template, words):
    path = write_jsonl(tmp_path / "a.jsonl", [{"m": said("a", "b")}] * 2)
    source = Source(dataset=path, messages="m")
    with pytest.raises(ValueError, match=f"2 {REFUSED}.*a.jsonl, line 1: .*{words}"):
        mixture(source, words=chat_words(template))


def test_other_stars_of_a_template_are_none():
    templates.check_steps(
        "**{{ '**' }}**{% generation %}{{ dict(a=1, **{}) }}{{ 2*3 }}"
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_a_template_that_never_ends(tmp_path, streaming, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    path = write_jsonl(tmp_path / "a.jsonl", [{"m": said("a", "b")}] * 2)
    source = Source(dataset=path, messages="m", streaming=streaming)
    began = time.monotonic()
    with pytest.raises(
        ValueError, match=r"a.jsonl, line \d: the chat template has not"
    ):
        list(mixture(source, words=chat_words(ENDLESS)).batches(0, 2))
    assert time.monotonic() - began < 20


def test_what_is_bounded_may_take_its_time():
    for _ in range(3):
        with templates.bounded(5.0):
            time.sleep(0.01)
    with pytest.raises(templates.EndlessTemplate), templates.bounded(0.05):
        while True:
            pass
    with pytest.raises(KeyError), templates.bounded(0.05):
        raise KeyError
    time.sleep(0.1)  # nothing comes afterwards


def test_an_assistant_may_begin():
    """Where the template lets it: else the chat is left out."""
    begins = [{"role": "assistant", "content": "welcome"}, *said("hi", "hello")]
    example = chat({"m": begins}, column="m", words=chat_words())
    assert example["fault"] == "" and example["answers"].any()
    asks = "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}"
    example = chat({"m": begins}, column="m", words=chat_words(asks + CHATML))
    assert example["fault"] == REFUSED and "no" in example["why"]


@pytest.mark.parametrize("as_text", [False, True])
def test_tool_calls_are_the_same_from_parquet(tmp_path, as_text):
    """Arrow gives each call the arguments of all; the template must not see these."""
    rows = USES
    if as_text:
        rows = [{**row, "tools": json.dumps(row["tools"])} for row in USES]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    words = chat_words(CALLS)
    found = []
    for name in (path, str(tmp_path / "a.parquet")):
        source = Source(dataset=name, messages="m", tools="tools")
        batch = mixture(source, words=words, stages=STAGES).batch(0)
        texts = [words.tokenizer.decode(row) for row in np.asarray(batch.tokens)]
        found.append(texts)
        assert not any("null" in text for text in texts)
    assert found[0] == found[1]
    for text, row in zip(found[0], USES[::-1], strict=True):
        want = words.tokenizer.apply_chat_template(
            row["m"], tools=row["tools"], tokenize=False
        )
        assert text.replace("<pad>", "") == want and '"properties"' in want


@pytest.mark.parametrize(
    ("tools", "message"),
    [("{", "text that is no JSON"), (3, "lists of JSON schemas"), (["a"], "schemas")],
)
def test_tools_that_are_none(tools, message):
    record = {"m": said("a", "b"), "tools": tools}
    example = chat(record, column="m", words=chat_words(CALLS), tools="tools")
    assert example["fault"] == MALFORMED and message in example["why"]
    for nothing in (None, "", "null", []):
        given = {**record, "tools": nothing}
        example = chat(given, column="m", words=chat_words(CALLS), tools="tools")
        assert not example["fault"]
    with pytest.raises(ValueError, match="`tools` is a column beside `messages`"):
        Source(dataset="a.jsonl", text="text", tools="tools")


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    rows = [{"m": said("a", half)} for half in ("ok", "\ud83d", "\U0001f600")]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    one = mixture(Source(dataset=path, messages="m"), words=chat_words())
    reader = one.readers[0][1]
    assert reader.skipped == {NO_TEXT: 1}
    assert "a.jsonl, line 2: its text has U+D83D" in reader.left_out.first[NO_TEXT]


def ending_words(template: str) -> Words:
    """Characters, and `<end>` behind them as a special token."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = template  # type: ignore[assignment]
    return Words(tokenizer, len(tokenizer))


def test_the_token_that_answers_end_with():
    ended = CHATML.replace(".\n", "<end>\n")
    words = ending_words(ended)
    assert turn_end(words) == words.tokenizer.convert_tokens_to_ids("<end>")
    assert turn_end(ending_words(ENDED)) == words.tokenizer.eos_token_id
    assert turn_end(ending_words(CHATML)) is None  # ends with a point and a line
    inside = CHATML.replace(".\n", "<end>more\n")
    assert turn_end(ending_words(inside)) is None
    outside = MARKED.replace(".\n{% endgeneration %}", "{% endgeneration %}<end>\n")
    assert turn_end(ending_words(outside)) is None  # no answer is trained to say it
    assert turn_end(ending_words("{{ raise_exception('no') }}")) is None


def test_a_long_chat_is_no_endless_template(monkeypatch):
    """Only what the template takes counts, not what the tokenizer does."""
    words = chat_words()
    encode = words.encode

    def slow(text: str) -> np.ndarray:
        time.sleep(0.1)
        return encode(text)

    monkeypatch.setattr(templates, "SECONDS", 0.25)
    monkeypatch.setattr(words, "encode", slow)
    assert not chat({"m": said("a", "b", "c", "d")}, column="m", words=words)["fault"]
