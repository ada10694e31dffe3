"""Between text and tokens: what a model has no token for, what is saved with it."""

import dataclasses
import logging
from typing import Any

import numpy as np
import pytest
from flax import nnx

from kvjax.models import Decoder, save
from kvjax.models.io import load_config
from kvjax.models.tokenizer import load_tokenizer
from kvjax.train.data.tokenizer import EOS, build_tokenizer
from kvjax.train.data.words import CHARACTERS, Words, words_of
from kvjax.train.recipe import DataConfig, Source
from kvjax.train.run import run
from kvjax.train.run.model import with_ends
from tests.train.datasets_samples import (
    CHATML,
    merging_tokenizer,
    mixture,
    said,
    write_jsonl,
)
from tests.train.tiny_run import recipe

pytestmark = pytest.mark.usefixtures("datasets_cache")

ENDS = CHATML.replace(".\n", "<eos>\n")
SHAPE = recipe().model


@pytest.fixture
def base(tmp_path) -> str:
    """A model of characters that stops at `<bos>`, with a chat template."""
    assert SHAPE is not None
    shape = dataclasses.replace(SHAPE, eos_tokens=(1,), num_layers=1)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = ENDS  # type: ignore[assignment]
    save(Decoder(shape, rngs=nnx.Rngs(0)), tmp_path / "base", tokenizer)
    return str(tmp_path / "base")


def test_a_model_of_characters_keeps_its_chat_template(base, tmp_path):
    words = words_of(recipe(model=None, init=base))
    (tmp_path / "saved").mkdir()
    words.save(tmp_path / "saved", 512)
    again = load_tokenizer(tmp_path / "saved")
    assert again.chat_template == ENDS
    assert again.get_vocab() == CHARACTERS.tokenizer.get_vocab()
    np.testing.assert_array_equal(words.encode("a b"), CHARACTERS.encode("a b"))
    assert words_of(recipe()) is CHARACTERS


def test_the_words_of_a_gguf_file(tmp_path):
    pytest.importorskip("gguf", reason="no gguf: pip install kvjax[gguf]")
    from kvjax.train.run.inputs import inputs_of
    from tests.gguf_files import write_gguf
    from tests.models.test_gguf import CASES, model_of

    path = write_gguf(tmp_path / "model.gguf", model_of(CASES["llama"]))
    config = recipe(model=None, init=str(path))
    assert words_of(config).decode([5, 6]) == "word1word2"
    assert str(path) in inputs_of(config, {})[f"init {str(path)!r}"]


def test_a_model_stops_where_its_answers_end(base):
    shape = load_config(base)
    model = nnx.eval_shape(lambda: Decoder(shape, rngs=nnx.Rngs(0)))
    assert with_ends(model, ()).config == shape
    assert with_ends(model, (1, EOS)).config.eos_tokens == (1, EOS)


def test_what_answers_end_with(tmp_path, base):
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"m": said("a", "b"), "p": "a", "a": "b", "t": "a"}]
    )
    words = words_of(recipe(model=None, init=base))
    cases: tuple[tuple[dict[str, Any], tuple[int, ...]], ...] = (
        ({"messages": "m"}, (EOS,)),
        ({"prompt": "p", "answer": "a"}, (EOS,)),
        ({"text": "t"}, ()),
    )
    for columns, ends in cases:
        assert mixture(Source(dataset=path, **columns), words=words).ends == ends


@pytest.mark.slow
def test_a_run_on_chats_saves_template_and_end(base, tmp_path, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", [{"m": said("a", "b")}] * 3)
    data = DataConfig(sources=(Source(dataset=path, messages="m"),))
    with caplog.at_level(logging.WARNING, logger="kvjax.train"):
        run(recipe(model=None, init=base, data=data), tmp_path / "run")
    assert caplog.text.count("answers end with <eos> (2)") == 1
    saved = tmp_path / "run" / "model"
    assert load_config(saved).eos_tokens == (1, EOS)
    assert load_tokenizer(saved).chat_template == ENDS


@pytest.mark.parametrize("vocab_size", [50, 99])
def test_a_model_that_has_no_token_for_some_characters(vocab_size, tmp_path):
    assert SHAPE is not None
    small = dataclasses.replace(SHAPE, vocab_size=vocab_size)
    with pytest.raises(
        ValueError, match=f"knows {vocab_size} tokens.*no token for '.*~"
    ):
        run(recipe(model=small), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("streaming", [False, True])
def test_tokens_that_the_model_does_not_know(tmp_path, streaming):
    path = write_jsonl(tmp_path / "a.jsonl", [{"t": "a"}, {"t": "the rain"}])
    source = Source(dataset=path, text="t", streaming=streaming)
    words = Words(merging_tokenizer(), 260)
    with pytest.raises(
        ValueError, match=r"a.jsonl, line 2: .*gives token \d+ \('.*260"
    ):
        mixture(source, words=words).batch(0)


def test_special_tokens_that_the_model_does_not_know():
    tokenizer = merging_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    known = len(tokenizer) - 1
    assert Words(tokenizer, known).pad == 0 < known == tokenizer.pad_token_id
    tokenizer.add_special_tokens({"eos_token": "<last>"})
    with pytest.raises(ValueError, match=rf"\('<last>'\), the model knows {known}"):
        Words(tokenizer, known)


@pytest.mark.parametrize("words", [CHARACTERS, Words(merging_tokenizer(), 300)])
def test_odd_texts(words):
    assert len(words.encode("\0 \n\ufeffé")) > 3
    assert len(words.encode("a b " * 10**5)) > 10**5  # one line
    with pytest.raises(ValueError, match=r"U\+DC80 at character 1, half of"):
        words.encode("a\udc80")
