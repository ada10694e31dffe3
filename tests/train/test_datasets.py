"""Datasets as sources: order, packing, resumption, and whole runs."""

import hashlib
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from kvjax.eval.tasks import make_task
from kvjax.models import Decoder, DecoderConfig, load, save
from kvjax.rope import Rope
from kvjax.train.data import Mixture, task_dataset
from kvjax.train.data.tokenizer import BOS, EOS, decode
from kvjax.train.data.words import Words
from kvjax.train.recipe import (
    CompressionChoice,
    DataConfig,
    SamplingConfig,
    Source,
    Stage,
    TrainConfig,
    load_config,
)
from kvjax.train.run import run
from tests.train.datasets_samples import (
    STAGES,
    TEXTS,
    chat_words,
    merging_tokenizer,
    mixture,
    said,
    same,
    write_jsonl,
)

DIGEST = "8dddd94e181ec20e46f7d35107a2f212a93c2cb166dbc1dc91df24adcc01a1bc"

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def questions(tmp_path) -> str:
    records = [
        {"c": f"[{i}={i * i}] ", "q": f"[{i}=", "a": f"{i * i}]"} for i in range(9)
    ]
    return write_jsonl(tmp_path / "questions.jsonl", records)


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


def test_batches_of_the_synthetic_recipes_do_not_change():
    """Committed models and interrupted runs depend on them."""
    digest = hashlib.sha256()
    for name, step in (("kvjax_tiny", 0), ("kvjax_tiny", 1000), ("tolerant", 3)):
        config = load_config(name)
        visible = config.sampling.visible
        batch = Mixture(config.data, config.stages, config.seed, visible).batch(step)
        for leaf in jax.tree.leaves(batch):
            digest.update(np.asarray(leaf).tobytes())
    assert digest.hexdigest() == DIGEST


@pytest.mark.slow
def test_a_run_on_text_with_the_model_of_another_tokenizer(tmp_path, texts):
    """It is evaluated, resumed bit for bit, and keeps its tokenizer."""
    shape = DecoderConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        rope=Rope(head_dim=8),
        tie_embeddings=True,
    )
    tokenizer = merging_tokenizer()
    save(Decoder(shape, rngs=nnx.Rngs(0)), tmp_path / "base", tokenizer)
    source = Source(dataset=texts, text="text", split="train[:9]", held_out="train[9:]")
    config = TrainConfig(
        init=str(tmp_path / "base"),
        data=DataConfig(sources=(source, Source(task="fact"))),
        stages=(Stage(steps=4, lengths={64: 1.0}, tokens_per_step=192),),
        sampling=SamplingConfig(choices=(CompressionChoice(compression="knorm"),)),
        log_every=1,
        eval_every=4,
        save_every=2,
        eval_items=2,
    )
    whole = run(config, tmp_path / "whole")
    run(config, tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "step_4")
    same(run(config, tmp_path / "part"), whole)
    lines = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    held = {event.get("held_out") for event in map(json.loads, lines)}
    assert held == {None, "fact@64", "texts.jsonl:train[9:]@64"}
    again, words = load(tmp_path / "whole" / "model")
    assert words.encode("the rain") == tokenizer.encode("the rain")
    assert again.config.vocab_size == 300
