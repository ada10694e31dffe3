"""A tokenizer that is saved over another: the new one is there, whole and alone."""

import dataclasses
import json
import pathlib
import shutil

import pytest
from flax import nnx

from kvjax.models import Decoder, load, save
from kvjax.models.tokenizer import load_tokenizer
from tests.faults.killing import Killed, calls, killed_at

from .samples import CONFIGS, sample

FOLDER = "additional_chat_templates"
JINJA = "chat_template.jinja"


def words(template=None, size: int = 9):
    """A tokenizer of `size` words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    table = {f"w{index}": index for index in range(size - 1)} | {"<unk>": size - 1}
    backend = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    found = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    found.chat_template = template
    return found


def templates(folder: pathlib.Path):
    return load_tokenizer(folder).chat_template


def test_templates_of_an_earlier_save_go(tmp_path):
    model = sample("qwen3")
    for given in (
        "old",
        None,
        {"default": "a", "tools": "b", "rag": "c"},
        {"default": "d", "rag": "e"},
        "new",
        {"default": "f", "tools": "g"},
        None,
    ):
        save(model, tmp_path, words(given))
        assert templates(tmp_path) == given
    assert not (tmp_path / FOLDER).exists() and not (tmp_path / JINJA).exists()


def test_files_of_another_tokenizer_go(tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"):
        (tmp_path / name).write_text("old")
    (tmp_path / "notes.json").write_text("mine")
    model = sample("qwen3")
    save(model, tmp_path)  # keeps what it has no other for
    assert (tmp_path / "merges.txt").read_text() == "old"
    save(model, tmp_path, words())
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_templates_of_others_stay(tmp_path, caplog):
    model, mine = sample("qwen3"), tmp_path / FOLDER / "mine.jinja"
    mine.parent.mkdir()
    mine.write_text("mine")
    (mine.parent / "notes.txt").write_text("mine")
    for given in ({"default": "a", "tools": "b"}, "c", {"default": "d", "rag": "e"}):
        caplog.clear()
        save(model, tmp_path, words(given))
        assert mine.read_text() == (mine.parent / "notes.txt").read_text() == "mine"
        whole = given if isinstance(given, dict) else {"default": given}
        assert templates(tmp_path) == whole | {"mine": "mine"}
        assert "mine.jinja" in caplog.text and "remove them" in caplog.text


@pytest.mark.parametrize("names", [["../config.json"], ["../x.jinja"], 3, ["a", 1]])
def test_a_record_names_no_other_files(tmp_path, names):
    model = sample("qwen3")
    save(model, tmp_path, words({"default": "a", "tools": "b"}))
    record = tmp_path / FOLDER / "kvjax_saved.json"
    record.write_text(json.dumps({"templates": names}))
    (tmp_path / "x.jinja").write_text("mine")
    save(model, tmp_path, words("c"))
    assert (tmp_path / "x.jinja").exists() and (tmp_path / "config.json").exists()
    record.write_text("{")
    before = (tmp_path / JINJA).read_text()
    with pytest.raises(ValueError, match="kvjax_saved.json is not JSON"):
        save(model, tmp_path, words("d"))
    assert (tmp_path / JINJA).read_text() == before
    assert load(tmp_path)[0].config == model.config


def wide(size: int) -> Decoder:
    config = dataclasses.replace(CONFIGS["qwen3"], vocab_size=size)
    return Decoder(config, rngs=nnx.Rngs(0))


def test_a_tokenizer_that_is_kept(tmp_path, caplog):
    save(wide(50), tmp_path, words("a", 50))
    save(wide(50), tmp_path)
    assert not caplog.text and len(load_tokenizer(tmp_path)) == 50
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match="of 50 tokens, and the model .* knows 40"):
        save(wide(40), tmp_path)
    assert (tmp_path / "config.json").read_text() == before
    save(wide(60), tmp_path)
    assert "tokenizer of 50 tokens, beside a model that knows 60" in caplog.text
    save(wide(40), tmp_path, words("b", 40))
    assert len(load_tokenizer(tmp_path)) == 40 and templates(tmp_path) == "b"


def test_one_token_more_than_the_model_is_kept_with_it(tmp_path, caplog):
    """As Gemma 3 has it, whose tokenizer knows a token of the models with images."""
    save(wide(40), tmp_path, words("a", 41))
    save(wide(40), tmp_path)
    assert len(load_tokenizer(tmp_path)) == 41 and not caplog.text


@pytest.mark.slow
def test_saves_of_tokenizers_killed_at_any_call(tmp_path):
    """The old tokenizer, the new one, or the remedy; also for the same model."""
    model, folder, old = sample("qwen3"), tmp_path / "model", tmp_path / "old"
    before = {"default": "a", "tools": "b", "rag": "c"}
    after = {"default": "d", "more": "e"}
    save(model, old, words(before, 9))
    shutil.copytree(old, folder)
    new, last = words(after, 8), words("f", 9)
    total, found = calls(tmp_path, lambda: save(model, folder, new)), []
    assert total > 20
    for call in range(total):
        shutil.rmtree(folder)
        shutil.copytree(old, folder)
        with pytest.raises(Killed), killed_at(call, tmp_path):
            save(model, folder, new)
        try:
            words_found = load(folder)[1]
        except ValueError as wrong:
            assert "Save the model there again" in str(wrong)
            found.append(1)
        else:
            size, template = len(words_found), words_found.chat_template
            assert (size, template) in ((9, before), (8, after))
            found.append(0 if size == 9 else 2)
        save(model, folder, last)
        assert templates(folder) == "f"
    assert found == sorted(found) and {*found} == {0, 1, 2}
