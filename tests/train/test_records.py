"""Records as tokens: what is answer, where a row may be compressed, what is refused."""

import numpy as np
import pytest

from kvjax.train.data.chats import REFUSED, REWRITTEN, chat
from kvjax.train.data.example import EMPTY, UNANSWERED, UNKNOWN, as_row
from kvjax.train.data.records import plain, preparation, question
from kvjax.train.data.words import CHARACTERS, Words
from kvjax.train.recipe import Source
from tests.train.datasets_samples import (
    CHATML,
    ENDED,
    FORGETS,
    MARKED,
    chat_words,
    merging_tokenizer,
    said,
)


def parts(example, words) -> tuple[str, str, list[str]]:
    """Text before the context ends, before the answer begins, and the answers."""
    assert not example["fault"]
    text = words.tokenizer.decode
    answers = np.asarray(example["answers"])
    edges = np.flatnonzero(np.diff(np.concatenate([[0], answers, [0]])))
    found = [
        text(example["tokens"][a:b])
        for a, b in zip(edges[::2], edges[1::2], strict=True)
    ]
    context, prompt = example["context"], example["prompt"]
    return text(example["tokens"][:context]), text(example["tokens"][:prompt]), found


@pytest.mark.parametrize("template", [CHATML, MARKED, ENDED])
def test_loss_is_on_the_answers_of_a_chat(template):
    words = chat_words(template)
    messages = said("hi", "hello", "how are you", "fine")
    example = chat({"m": [*messages, *said("bye")]}, column="m", words=words)
    before, asked, answers = parts(example, words)
    end = "<eos>" if template == ENDED else ""
    assert answers == ["hello.\n", "fine.\n" + end]
    assert before == "<user>hi.\n<assistant>hello.\n"
    assert asked == before + "<user>how are you.\n<assistant>"
    row = as_row(example)
    np.testing.assert_array_equal(row.weights, row.answers.astype(np.float32))


def test_a_chat_without_a_past_is_compressed_behind_its_question():
    words = chat_words()
    row = as_row(chat({"m": said("hi", "hello")}, column="m", words=words))
    assert row.context == 0
    assert row.point(0.9, 0.5) == row.point(0.1, 0.5) == row.prompt > 0
    system = [{"role": "system", "content": "a document"}, *said("hi", "hello")]
    row = as_row(chat({"m": system}, column="m", words=words))
    assert words.tokenizer.decode(row.tokens[: row.context]) == "<system>a document.\n"
    assert row.point(0.1, 0.5) == row.prompt and row.point(0.9, 0.5) == row.context


def test_keys_that_a_dataset_fills_with_none_are_gone():
    words = chat_words()
    filled = [{**m, "tool_calls": None} for m in said("hi", "hello")]
    example = chat({"m": filled}, column="m", words=words)
    want = chat({"m": said("hi", "hello")}, column="m", words=words)
    np.testing.assert_array_equal(example["tokens"], want["tokens"])


@pytest.mark.parametrize(
    ("messages", "template", "fault"),
    [
        (None, CHATML, EMPTY),
        ([], CHATML, EMPTY),
        (said("hi"), CHATML, UNANSWERED),
        (said("a", "b", "c", "d"), FORGETS, REWRITTEN),
        (said("a", "b"), "{{ raise_exception('no') }}", REFUSED),
    ],
)
def test_chats_that_give_no_row(messages, template, fault):
    example = chat({"m": messages}, column="m", words=chat_words(template))
    assert example["fault"] == fault and not len(example["tokens"])


def test_one_answer_is_known_even_where_templates_forget():
    """Only what is written anew later is refused, not every such template."""
    words = chat_words(FORGETS)
    *_, answers = parts(chat({"m": said("a", "b")}, column="m", words=words), words)
    assert answers == ["(thought)b.\n"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", "'m' must hold lists of messages; got str"),
        ([{"from": "user", "contents": "x"}], r"`role` and `content`.*'contents'"),
        ([{"role": "user", "contents": "x"}], "Did you mean 'contents'"),
    ],
)
def test_columns_that_hold_no_chats(value, message):
    with pytest.raises(ValueError, match=message):
        chat({"m": value}, column="m", words=chat_words())


def test_questions_and_plain_text():
    record = {"c": "a text. ", "q": "which? ", "a": "this"}
    columns = ("c", "q", "a")
    example = question(record, columns=columns, words=CHARACTERS)
    got = parts(example, CHARACTERS)
    assert got == ("<bos>a text. ", "<bos>a text. which? ", ["this<eos>"])
    bare = question(record, columns=("", "q", "a"), words=CHARACTERS)
    assert bare["context"] == 0 and bare["prompt"] == len("which? ") + 1
    for fault, change in ((UNANSWERED, {"a": " "}), (EMPTY, {"c": None, "q": ""})):
        changed = {**record, **change}
        assert question(changed, columns=columns, words=CHARACTERS)["fault"] == fault
    example = plain({"t": "a\n"}, column="t", words=CHARACTERS)
    assert CHARACTERS.tokenizer.decode(example["tokens"]) == "<bos>a\n<eos>"
    assert example["answers"].all()
    for nothing in (None, "", " \n\t"):
        assert plain({"t": nothing}, column="t", words=CHARACTERS)["fault"] == EMPTY
    with pytest.raises(ValueError, match="'t' must hold text; got int: '3'"):
        plain({"t": 3}, column="t", words=CHARACTERS)


def test_words_are_those_of_the_tokenizer():
    words = Words(merging_tokenizer(), 300)
    assert (words.begin, words.end) == ((), (0,))  # has no <bos>
    example = plain({"t": "the rain"}, column="t", words=words)
    assert words.tokenizer.decode(example["tokens"]) == "the rain<end>"
    assert len(example["tokens"]) < len("the rain")
    small = Words(merging_tokenizer(), 100)
    with pytest.raises(ValueError, match="the model knows 100"):
        small.encode("the rain é")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("some words", ""),
        ("naïve, déjà vu", ""),
        ("слова", UNKNOWN),
        ("五月 2", UNKNOWN),
    ],
)
def test_text_that_the_tokenizer_does_not_know_is_left_out(text, fault):
    source = Source(dataset="a.jsonl", text="t")
    assert preparation(source, CHARACTERS)({"t": text})["fault"] == fault
    source = Source(dataset="a.jsonl", prompt="q", answer="t")
    found = preparation(source, CHARACTERS)({"q": "五月六月七月", "t": text})
    assert found["fault"] == fault


def test_a_tokenizer_that_ends_with_its_unknown_token_knows_every_byte():
    words = chat_words()
    words.tokenizer.unk_token = words.tokenizer.eos_token
    assert words.unknown(np.asarray(words.end * 3)) == 0
