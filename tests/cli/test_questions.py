"""`kvjax generate --question`, and commands that are given a GGUF file."""

import json
import shutil

import jax.numpy as jnp
import pytest
from flax import nnx

import kvjax as library
from kvjax.models import Decoder

TEXT = "[KQ=ab3d] The sun is low. [XW=9fk2] The rain is warm. " * 3
ASK = ("--max-new-tokens", 5, "--dtype", "float32")
SNAPKV = ("--compression", "snapkv", "--set", "evict.score.window=8")


def asked(kvjax, checkpoint, *words: object) -> dict:
    given = ("generate", "--model", checkpoint, "--prompt", TEXT, *ASK, *words)
    code, out, err = kvjax(*given, "--json")
    assert code == 0, err
    return json.loads(out)


def test_questions_are_answered_from_one_cache(kvjax, checkpoint):
    one, two = ("--question", "Who?"), ("--question", "What is it?")
    both = asked(kvjax, checkpoint, *SNAPKV, *one, *two)
    assert [a["question"] for a in both["answers"]] == ["Who?", "What is it?"]
    # None of them sees another one, and the text was compressed without any.
    turned = asked(kvjax, checkpoint, *SNAPKV, *two, *one)
    assert turned["answers"] == both["answers"][::-1]
    whole = asked(kvjax, checkpoint, *one)
    assert both["prompt_tokens"] == len(TEXT.strip()) + 2 == whole["prompt_tokens"]
    assert both["resident_bytes"] < whole["resident_bytes"] and both["keep"] == 0.25
    # With the whole cache, it is what the prompt with the question gives.
    prompt = f"{TEXT.strip()}\n\nQuestion: Who?\nAnswer:"
    plain = ("generate", "--model", checkpoint, "--prompt", prompt, *ASK, "--json")
    code, out, _ = kvjax(*plain)
    assert code == 0 and json.loads(out)["tokens"] == whole["answers"][0]["tokens"]


def test_questions_are_printed(kvjax, checkpoint):
    words = ("generate", "--model", checkpoint, "--prompt", TEXT, *ASK, *SNAPKV)
    code, out, err = kvjax(*words, "--question", "Who?", "--question", "Why?")
    assert code == 0 and out.startswith("> Who?\n") and "\n\n> Why?\n" in out
    assert f"{len(TEXT.strip()) + 2} prompt tokens, cache " in err


@pytest.fixture
def chatting(checkpoint, tmp_path):
    """A function of a template: the checkpoint with it."""

    def build(template: str):
        folder = shutil.copytree(checkpoint, tmp_path / "chat")
        (folder / "chat_template.jinja").write_text(template)
        return folder

    return build


CHAT = (
    "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


def test_a_chat_template_is_used(kvjax, chatting):
    folder = chatting(CHAT)
    found = asked(kvjax, folder, "--question", " Who? ")
    prompt = f"[{TEXT.strip()}\n\nWho?]="
    assert found["prompt_tokens"] == len(TEXT.strip()) + 3
    plain = ("generate", "--model", folder, "--prompt", prompt, *ASK, "--json")
    code, out, _ = kvjax(*plain)
    assert code == 0 and json.loads(out)["tokens"] == found["answers"][0]["tokens"]


@pytest.mark.parametrize(
    ("template", "question", "match"),
    [
        (CHAT, " \n", "--question is empty"),
        (CHAT.replace("m.content", "m.content | upper"), "Who?", "changes the text"),
        (CHAT + "{{ raise_exception('no') }}", "Who?", "the chat template refuses"),
        ("{{ messages[0].content | length }}" + CHAT, "Who?", None),
        ("{{ messages[0].content | length }}" + CHAT, "Why is it?", "another text for"),
    ],
)
def test_questions_that_cannot_be_asked(kvjax, chatting, template, question, match):
    folder = chatting(template)
    words = ("generate", "--model", folder, "--prompt", TEXT, *ASK)
    code, _, err = kvjax(*words, "--question", question, "--question", "Who?")
    assert (code, match is None or match in err) == (0 if match is None else 2, True)


def test_a_gguf_file_in_every_command(kvjax, tmp_path):
    pytest.importorskip("gguf", reason="no gguf: pip install kvjax[gguf]")
    from kvjax.models.bundled import shape_of
    from tests.gguf_files import write_gguf
    from tests.models.test_gguf import CASES

    model = Decoder(CASES["llama"], dtype=jnp.float32, rngs=nnx.Rngs(0))
    path = write_gguf(tmp_path / "model.gguf", model)
    out = tmp_path / "out"
    code, text, err = kvjax("convert", path, out, "--dtype", "float32", "--json")
    assert code == 0, err
    assert "model.safetensors" in json.loads(text)["files"]
    found, tokenizer = library.load(out, "float32")
    assert found.config == shape_of(str(path)) and tokenizer.decode([5]) == "word1"
    words = ("--model", path, "--prompt", "word1", "--max-new-tokens", 2, "--json")
    code, text, err = kvjax("generate", *words, "--dtype", "float32")
    assert code == 0 and len(json.loads(text)["tokens"]) <= 2, err
    (tmp_path / "model.gguf").write_bytes(path.read_bytes()[:3000])
    code, _, err = kvjax("convert", path, tmp_path / "other")
    assert code == 2 and "model.gguf is not a whole GGUF file" in err
    assert not (tmp_path / "other").exists()
