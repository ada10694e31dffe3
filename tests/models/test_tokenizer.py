"""Tokenizers travel with their checkpoint."""

import pytest

from kvjax.models import load, save

from .samples import sample

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "user", ":", "the", "cat", "sat"]
    table = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    out = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    out.chat_template = TEMPLATE
    return out


@pytest.fixture
def directory(tokenizer, tmp_path):
    save(sample("qwen3"), tmp_path, tokenizer)
    return tmp_path


def test_round_trip_keeps_ids_and_chat_template(directory, tokenizer):
    _, again = load(directory)
    assert again("the cat sat")["input_ids"] == [6, 7, 8]
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (1, 2, 0)
    assert again.chat_template == TEMPLATE
    pytest.importorskip("jinja2", reason="rendering a chat template needs jinja2")
    chat = [{"role": "user", "content": "the cat"}]
    assert again.apply_chat_template(chat, tokenize=False) == "user: the cat "


def test_a_lone_tokenizer_json_is_enough(directory):
    (directory / "tokenizer_config.json").unlink()
    _, again = load(directory)
    assert again("the cat")["input_ids"] == [6, 7]
    assert (again.bos_token, again.eos_token) == ("<s>", "</s>")
    assert again.chat_template == TEMPLATE


def test_unreadable_and_missing_tokenizers(directory):
    (directory / "tokenizer.json").write_text("{broken")
    with pytest.raises(ValueError, match="Cannot read the tokenizer in"):
        load(directory)
    (directory / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="Cannot read the tokenizer in"):
        load(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer.*tokenizer=False"):
        load(directory)
    assert load(directory, tokenizer=False)[1] is None
