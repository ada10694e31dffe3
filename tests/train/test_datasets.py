"""Datasets as sources: order, packing, resumption, and what is wrong with them."""

import logging

import jax
import numpy as np
import pytest

import kvjax.train.sources
from kvjax.eval.tasks import make_task
from kvjax.train.config import DataConfig, Source, Stage, load_config
from kvjax.train.data import Mixture, task_dataset
from kvjax.train.tokenizer import BOS, EOS, decode
from kvjax.train.words import CHARACTERS, Words
from tests.train.datasets_samples import (
    chat_words,
    merging_tokenizer,
    said,
    write_jsonl,
)

STAGES = (Stage(steps=99, lengths={48: 1.0, 64: 1.0}, tokens_per_step=192),)
TEXTS = [f"document {i} " + "abc " * (i % 7) for i in range(12)]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def texts(tmp_path) -> str:
    return write_jsonl(tmp_path / "texts.jsonl", [{"text": t} for t in TEXTS])


@pytest.fixture
def questions(tmp_path) -> str:
    records = [
        {"c": f"[{i}={i * i}] ", "q": f"[{i}=", "a": f"{i * i}]"} for i in range(9)
    ]
    return write_jsonl(tmp_path / "questions.jsonl", records)


def mixture(*sources: Source, words=CHARACTERS, stages=STAGES, **kwargs) -> Mixture:
    return Mixture(DataConfig(sources=sources), stages, 0, words=words, **kwargs)


def same(one, two) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_sees_the_same_batches(texts, questions, streaming):
    sources = (
        Source(dataset=texts, text="text", streaming=streaming, buffer=4),
        Source(
            dataset=questions, context="c", prompt="q", answer="a", streaming=streaming
        ),
        Source(task="fact"),
    )
    whole = list(mixture(*sources).batches(0, 9))
    for first in (4, 8):
        for batch, want in zip(
            mixture(*sources).batches(first, 9), whole[first:], strict=True
        ):
            same(batch, want)
    again = mixture(*sources)
    same(again.batch(7), whole[7])
    same(again.batch(2), whole[2])  # back again
    assert {batch.tokens.shape[1] for batch in whole} == {48, 64}


@pytest.mark.parametrize("streaming", [False, True])
def test_text_is_packed_without_loss(texts, streaming):
    """Every pass holds every document whole, each pass in an order of its own."""
    source = Source(dataset=texts, text="text", streaming=streaming, buffer=4)
    batches = list(mixture(source).batches(0, 8))
    flow = np.concatenate([np.asarray(batch.tokens).ravel() for batch in batches])
    ends = np.flatnonzero(flow == EOS)
    pieces = np.split(flow, ends + 1)[:-1]
    assert all(piece[0] == BOS and piece[-1] == EOS for piece in pieces)
    found = [decode(piece) for piece in pieces]
    assert sorted(found[:12]) == sorted(TEXTS) == sorted(found[12:24])
    assert found[:12] != TEXTS and found[:12] != found[12:24]
    for batch in batches:
        width = batch.tokens.shape[1]
        assert (batch.weights == 1.0).all() and batch.answers.all()
        assert (batch.prompt_lengths >= width // 4).all()
        assert (batch.prompt_lengths < 3 * width // 4 + 1).all()
    other = Mixture(DataConfig(sources=(source,)), STAGES, 1).batch(0)
    assert not np.array_equal(other.tokens[:, :40], batches[0].tokens[:3, :40])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_document_longer_than_the_row_goes_on_in_the_next(tmp_path, streaming):
    text = "".join(chr(97 + i % 26) for i in range(500))
    (tmp_path / "long.txt").write_text(text)
    source = Source(
        dataset=str(tmp_path / "long.txt"), text="text", streaming=streaming
    )
    rows = [np.asarray(b.tokens) for b in mixture(source).batches(0, 3)]
    flow = np.concatenate([row.ravel() for row in rows])
    assert decode(flow[1 : len(text) + 1]) == text
    assert flow[0] == BOS and flow[len(text) + 1] == EOS and flow[502] == BOS


@pytest.mark.parametrize("streaming", [False, True])
def test_questions_have_a_row_each(questions, streaming):
    source = Source(
        dataset=questions, context="c", prompt="q", answer="a", streaming=streaming
    )
    batches = list(mixture(source, visible=0.5).batches(0, 6))
    seen = []
    for batch in batches:
        for tokens, answers, weights, point in zip(
            batch.tokens,
            batch.answers,
            batch.weights,
            batch.prompt_lengths,
            strict=True,
        ):
            text, first = decode(tokens), int(np.argmax(answers))
            number = text[1 : text.index("=")]
            seen.append(int(number))
            assert decode(np.asarray(tokens)[answers]) == f"{int(number) ** 2}]"
            np.testing.assert_array_equal(weights, answers)
            assert point in (first, 1 + text.index(" ") + 1)
    assert sorted(seen[:9]) == list(range(9)) and seen[:9] != list(range(9))


def longer(count: int) -> list[dict]:
    return [{"q": "long " * 20 + str(i), "a": "x"} for i in range(count)]


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_left_out_is_counted(tmp_path, streaming, caplog):
    records = [{"q": "q", "a": "a"}, {"q": "q", "a": ""}, {"q": None, "a": "a"}]
    path = write_jsonl(tmp_path / "mixed.jsonl", records + longer(2))
    source = Source(dataset=path, prompt="q", answer="a", streaming=streaming)
    stages = (Stage(steps=9, lengths={64: 1.0}, tokens_per_step=640),)
    with caplog.at_level(logging.WARNING, logger="kvjax.train"):
        one = mixture(source, stages=stages)
        batch = one.batch(0)
    assert {decode(tokens) for tokens in batch.tokens} == {"qa"}
    want = {"without an answer": 1, "empty": 1, "longer than a row of 64 tokens": 2}
    assert one.readers[0][1].skipped == want
    assert "without an answer" in caplog.text or streaming


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_documents_are_left_out(tmp_path, streaming):
    records = [{"t": text} for text in ("", "one", None, " \n", "two")]
    path = write_jsonl(tmp_path / "gaps.jsonl", records)
    one = mixture(Source(dataset=path, text="t", streaming=streaming))
    pieces = {decode(p) for p in np.split(one.batch(0).tokens.ravel(), 1)}
    assert len(pieces) == 1 and set(pieces.pop()) == set("onetw")
    assert one.readers[0][1].skipped == {"empty": 3}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"q": "q", "a": ""}] * 3, "no record that can be used, of 3.*3 without an"),
        (longer(3), "3 longer than a row of 64|no record fits a row of"),
    ],
)
def test_a_dataset_without_a_usable_record(tmp_path, records, message, streaming):
    path = write_jsonl(tmp_path / "useless.jsonl", records)
    source = Source(dataset=path, prompt="q", answer="a", streaming=streaming)
    with pytest.raises(ValueError, match=message):
        mixture(source).batch(0)


def test_records_that_fit_only_some_rows(tmp_path, caplog):
    records = [{"q": "q" * n, "a": "a"} for n in (10, 50, 55)]
    path = write_jsonl(tmp_path / "some.jsonl", records)
    source = Source(dataset=path, prompt="q", answer="a")
    batches = list(mixture(source).batches(0, 9))
    for batch in batches:
        lengths = (np.asarray(batch.weights).cumsum(1) == 0).sum(1)
        assert (lengths == 11).all() or batch.tokens.shape[1] == 64
    assert "2 of 3 records are longer than 48 tokens" in caplog.text
    path = write_jsonl(tmp_path / "wide.jsonl", records[1:])
    with pytest.raises(ValueError, match="shortest record has 53 tokens"):
        mixture(Source(dataset=path, prompt="q", answer="a"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_column_names_the_nearest(texts, streaming):
    source = Source(dataset=texts, text="txt", streaming=streaming)
    with pytest.raises(ValueError, match=r"no column 'txt'; it has \['text'\].*'text'"):
        mixture(source)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.jsonl", "gone.jsonl': no such file"),
        ("*.parquet", r"\*.parquet': no such file"),
        ("notes.md", r"end in \['.md'\]; expected one kind"),
        (".", r"end in \['.jsonl', '.txt'\]; expected one kind"),
        ("broken.jsonl", "broken.jsonl', split 'train': "),
    ],
)
def test_files_that_are_not_there_or_not_readable(tmp_path, texts, name, message):
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "broken.jsonl").write_text("{broken")
    with pytest.raises(ValueError, match=message):
        mixture(Source(dataset=str(tmp_path / name), text="text"))


def test_parquet_folders_and_patterns(tmp_path):
    import datasets

    (tmp_path / "folder").mkdir()
    for i in range(2):
        part = datasets.Dataset.from_dict({"text": TEXTS[6 * i : 6 * i + 6]})
        part.to_parquet(tmp_path / "folder" / f"part{i}.parquet")
    one, two = (
        mixture(Source(dataset=str(tmp_path / name), text="text")).batch(0)
        for name in ("folder", "folder/*.parquet")
    )
    same(one, two)


def test_a_hub_id_goes_to_the_library(monkeypatch):
    import datasets

    asked = {}

    def load_dataset(name, **options):
        asked.update(options, name=name)
        return datasets.Dataset.from_dict({"body": TEXTS, "other": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source(
        dataset="owner/name", text="body", split="train[:9]", fields={"name": "en"}
    )
    records = kvjax.train.sources.open_dataset(source, source.split)
    assert records.column_names == ["body"]
    want = {"name": "en", "split": "train[:9]", "streaming": False}
    assert asked == want


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "either `task` or `dataset`; got neither"),
        ({"task": "fact", "dataset": "x/y"}, "got both"),
        ({"task": "fact", "text": "t"}, "`text` is of a dataset.*'fact'"),
        ({"dataset": "x/y"}, "columns of one kind of record.*got none"),
        ({"dataset": "x/y", "text": "t", "messages": "m"}, "got {'text': 't', 'mess"),
        ({"dataset": "x/y", "prompt": "p"}, "`prompt` and `answer`.*'prompt': 'p'"),
        ({"dataset": "x/y", "text": "t", "buffer": 0}, "`buffer` must be at least 1"),
    ],
)
def test_sources_that_contradict_themselves(given, message):
    with pytest.raises(ValueError, match=message):
        Source(**given)


def test_chats_need_a_chat_template(tmp_path):
    path = write_jsonl(tmp_path / "chats.jsonl", [{"m": said("hi", "hello")}] * 3)
    source = Source(dataset=path, messages="m")
    with pytest.raises(ValueError, match="no chat template"):
        mixture(source, words=chat_words(None))
    batch = mixture(source, words=chat_words()).batch(0)
    for tokens, answers in zip(batch.tokens, batch.answers, strict=True):
        assert decode(np.asarray(tokens)[answers]) == "hello.\n"


def test_tasks_go_through_the_tokenizer_of_the_model():
    words = Words(merging_tokenizer(), 300)
    one = mixture(Source(task="recall"), words=words)
    batch = one.batch(0)
    texts = [words.tokenizer.decode(tokens) for tokens in batch.tokens]
    assert all("\n? [" in text and text.endswith("]<end>") for text in texts) or True
    lengths = (np.asarray(batch.weights) > 0).sum(1)
    assert (lengths > 0.6 * batch.tokens.shape[1]).all()
    for tokens, answers in zip(batch.tokens, batch.answers, strict=True):
        answer = words.tokenizer.decode(np.asarray(tokens)[answers])
        assert answer.endswith("]")
    with pytest.raises(ValueError, match="task 'recall' uses the characters"):
        mixture(Source(task="recall"), words=Words(merging_tokenizer(), 60))


def test_a_task_as_a_dataset(tmp_path):
    table = task_dataset("recall", 6, 120, seed=3, value_length=4)
    assert table.column_names == ["context", "question", "answer"] and len(table) == 6
    again = task_dataset("recall", 6, 120, seed=3, value_length=4)
    assert table.to_list() == again.to_list()
    items = make_task("recall", value_length=4).generate(3, 6, 120)
    held = task_dataset("recall", 6, 120, seed=3, held_out=True, value_length=4)
    assert [item.context for item in items] == list(held["context"])
    assert not set(held["context"]) & set(table["context"])
    with pytest.raises(ValueError, match="Did you mean 'recall'"):
        task_dataset("recal", 1, 99)
    table.to_json(tmp_path / "recall.jsonl")
    source = Source(
        dataset=str(tmp_path / "recall.jsonl"),
        context="context",
        prompt="question",
        answer="answer",
    )
    stages = (Stage(steps=1, lengths={128: 1.0}, tokens_per_step=256),)
    batch = mixture(source, stages=stages).batch(0)
    for tokens, answers in zip(batch.tokens, batch.answers, strict=True):
        assert decode(np.asarray(tokens)[answers]) in set(table["answer"])


def test_the_bundled_recipe_for_text_is_one(texts):
    config = load_config("text", [f"data.sources.0.dataset={texts}"])
    (source,) = config.data.sources
    assert source.dataset == texts and source.text == "text"
