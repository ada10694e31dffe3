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
    assert both["keep"] == 0.25
    # None of them sees another one, and the text was compressed without any.
    turned = asked(kvjax, checkpoint, *SNAPKV, *two, *one)
    assert turned["answers"] == both["answers"][::-1]
    words = ("generate", "--model", checkpoint, "--prompt", TEXT, *ASK, *SNAPKV)
    code, out, err = kvjax(*words, *one, *two)
    assert code == 0 and f"{both['prompt_tokens']} prompt tokens, cache " in err
    said = [f"> {a['question']}\n{a['text']}" for a in both["answers"]]
    assert out.split() == "\n".join(said).split() and "\n\n> What is" in out


CHAT = (
    "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


@pytest.mark.parametrize("template", ["", CHAT])
def test_the_whole_cache_answers_as_one_prompt(kvjax, checkpoint, tmp_path, template):
    """With the model's template, if there is one, and the question behind the text."""
    folder, text = shutil.copytree(checkpoint, tmp_path / "chat"), TEXT.strip()
    prompt = f"{text}\n\nQuestion: Who?\nAnswer:"
    if template:
        (folder / "chat_template.jinja").write_text(template)
        prompt = f"[{text}\n\nWho?]="
    found = asked(kvjax, folder, "--question", " Who? ")
    # The begin token or the bracket, the text, two line breaks.
    assert found["prompt_tokens"] == 1 + len(text) + 2
    tokenizer = library.load(folder)[1]
    ids = tokenizer.encode(prompt, add_special_tokens=not template)
    model = library.load(folder, "float32", tokenizer=False)[0]
    out = library.generate(model, jnp.asarray([ids]), max_new_tokens=5)
    made = out.tokens[0, : int(out.lengths[0])].tolist()
    assert found["answers"][0]["tokens"] == made


@pytest.mark.parametrize(
    ("template", "question", "match"),
    [
        (CHAT, " \n", "--question is empty"),
        (CHAT.replace("m.content", "m.content | upper"), "Who?", "not write each"),
        (CHAT + "{{ raise_exception('no') }}", "Who?", "the chat template refuses"),
        (
            "{{ messages[0].content | length }}" + CHAT,
            "Why is it?",
            "around other mess",
        ),
    ],
)
def test_questions_that_cannot_be_asked(
    kvjax, checkpoint, tmp_path, template, question, match
):
    folder = shutil.copytree(checkpoint, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text(template)
    words = ("generate", "--model", folder, "--prompt", TEXT, *ASK)
    code, _, err = kvjax(*words, "--question", question, "--question", "Who?")
    assert code == 2 and match in err


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
