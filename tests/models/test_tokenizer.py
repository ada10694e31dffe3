"""Tokenizers travel with their checkpoint."""

import json
from typing import Any

import pytest

from kvjax.cli.generate import Generate
from kvjax.eval.text import Tokenizer as Characters
from kvjax.models import load, save
from kvjax.models.tokenizer import encoded, load_tokenizer
from kvjax.train.data.words import Words

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


def faulty(directory, edit):
    """The directory's tokenizer behind an edit of its `tokenizer.json`."""
    path = directory / "tokenizer.json"
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))
    return load_tokenizer(directory)


def no_unknown(raw):
    raw["model"] |= {"unk_token": "[UNK]"}


def unnamed_special(raw):
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "B", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    }


def large_ids(raw):
    raw["model"]["vocab"]["dog"] = 2**31 + 5


def stray_ids(raw):
    raw["post_processor"] = {"type": "RobertaProcessing", "sep": ["</s>", 2]}
    raw["post_processor"] |= {"cls": ["<s>", 77], "trim_offsets": True}
    raw["post_processor"] |= {"add_prefix_space": False}


@pytest.mark.parametrize(
    ("edit", "text", "match"),
    [
        (no_unknown, "dog", r"cannot encode 'dog': .*\[UNK\]"),
        (unnamed_special, "the", "cannot encode 'the': index out of bounds"),
        (large_ids, "dog", "gives token 2147483653 for 'dog', which is no id"),
        (stray_ids, "the", "gives token 77 for 'the', which is no id of its 9 tokens"),
        (dict, "\ud800", "cannot encode '.ud800': TextEncodeInput"),
        (no_unknown, "dog" * 9000, "cannot encode 'dogdog"),
    ],
)
def test_what_fails_while_encoding_names_the_tokenizer(directory, edit, text, match):
    found = faulty(directory, edit)
    with pytest.raises(ValueError, match=match) as said:
        encoded(found, text)
    assert str(directory) in str(said.value) and len(str(said.value)) < 1500


def test_all_who_encode_are_told(directory):
    found = faulty(directory, no_unknown)
    calls = (
        lambda: Characters(found, 9),
        lambda: Words(found, 9),
        lambda: Generate(prompt="a")._encode(found, "dog"),
        lambda: Generate(prompt="a", stop=("dog",))._stops(found),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"{directory.name}' cannot encode"):
            call()


def test_a_vocabulary_with_holes(directory):
    def edit(raw):
        raw["model"]["vocab"]["dog"] = 500

    assert encoded(faulty(directory, edit), "the dog") == [6, 500]


def test_a_panic_while_loading(directory):
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    with pytest.raises(ValueError, match="Cannot read the tokenizer in"):
        faulty(directory, lambda raw: raw.update(normalizer=charsmap))


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_passes(kind):
    class Interrupted:
        def encode(self, text):
            raise kind

    with pytest.raises(kind):
        encoded(Interrupted(), "a")


def bytes_of(directory, **settings):
    """A byte-level tokenizer that keeps digits together and splits at spaces alone."""
    from tokenizers import AddedToken, Regex, Tokenizer, models
    from tokenizers import decoders as back
    from tokenizers import pre_tokenizers as pre

    letters = sorted(pre.ByteLevel.alphabet())
    table = {letter: index for index, letter in enumerate(letters)}
    pairs = [("1", "2"), ("12", "3"), ("Ġ", "Ġ"), ("l", "l"), ("o", "Ġ")]
    for pair in pairs:
        table["".join(pair)] = len(table)
    backend = Tokenizer(models.BPE(table, pairs))
    backend.pre_tokenizer = pre.Sequence(
        [pre.Split(Regex("[^ ]+ *"), "isolated"), pre.ByteLevel(False, False, False)]
    )
    backend.decoder = back.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return backend, len(table)


TEXT = "Hello  to 12345 123 \n\n naïve 你好"


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3_text", "llama", "phi3"])
@pytest.mark.parametrize("null", [False, True])
def test_tokenizer_json_is_followed_without_a_class(tmp_path, family, null, caplog):
    settings = {"chat_template": TEMPLATE} | ({"tokenizer_class": None} if null else {})
    backend, end = bytes_of(tmp_path / "words", **settings)
    config = {"model_type": family, "eos_token_id": [end, 3]}
    (tmp_path / "words" / "config.json").write_text(json.dumps(config))
    found = load_tokenizer(tmp_path / "words")
    assert found.encode(TEXT) == backend.encode(TEXT).ids
    assert found.decode(found.encode(TEXT)) == TEXT
    assert (found.chat_template, found.eos_token) == (TEMPLATE, "<end>")
    assert not caplog.text
    found.save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").encode(TEXT) == found.encode(TEXT)


@pytest.mark.parametrize(
    "name", ["Qwen2Tokenizer", "Qwen2TokenizerFast", "GPT2Tokenizer"]
)
def test_a_class_that_gives_other_ids_is_told(tmp_path, name, caplog):
    given = {"tokenizer_class": name, "chat_template": TEMPLATE, "eos_token": None}
    backend, end = bytes_of(tmp_path / "words", **given)
    config = {"model_type": "qwen2", "eos_token_id": end}
    (tmp_path / "words" / "config.json").write_text(json.dumps(config))
    found = load_tokenizer(tmp_path / "words")
    assert found.encode(TEXT) == backend.encode(TEXT).ids
    assert (found.chat_template, found.eos_token) == (TEMPLATE, None)
    assert f"names the class '{name}', which gives other ids" in caplog.text


def test_a_class_that_gives_the_same_ids_is_kept(tmp_path, caplog):
    from transformers import Qwen2Tokenizer

    table = {"a": 0, "b": 1, "ab": 2, "Ġ": 3, "<|endoftext|>": 4}
    merges: Any = [("a", "b")]
    given = Qwen2Tokenizer(vocab=table, merges=merges)
    given.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    found = load_tokenizer(tmp_path)
    assert type(found) is Qwen2Tokenizer and not caplog.text
    assert found.encode("ab ab") == given.encode("ab ab") == [2, 3, 2]


def test_tokenizers_of_published_models(shared_data, tmp_path, caplog):
    """By their vocabulary they load as ever, and as saved they are their file's own."""
    import gzip

    from tokenizers import Tokenizer

    text = f"{TEXT} It's 3.14!\r\n\tЗдравствуй 日本語 🙂"
    for name, family in (("gpt2", "gpt2"), ("qwen2", "qwen2")):
        folder = tmp_path / name
        folder.mkdir()
        for path in (shared_data / "tokenizers" / name).glob("*.gz"):
            (folder / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
        (folder / "config.json").write_text(json.dumps({"model_type": family}))
        first = load_tokenizer(folder)
        first.save_pretrained(folder)
        again = load_tokenizer(folder)
        raw = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
        assert type(again) is type(first)
        assert first.encode(text) == again.encode(text) == raw
    stories = shared_data / "models" / "stories260k"
    raw = Tokenizer.from_file(str(stories / "tokenizer.json")).encode(text).ids
    assert load_tokenizer(stories).encode(text) == raw
    assert not caplog.text
