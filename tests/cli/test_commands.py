"""The command line from the outside: exit codes, what goes where, what it says."""

import io
import json
import re
import shlex
import shutil

import pytest

from kvjax.cli.base import headline, pick, split
from kvjax.cli.generate import Generate, Stream
from kvjax.cli.main import COMMANDS, dotted, overview, parse
from kvjax.compress import compressions
from kvjax.eval.config import bundled_evaluations
from kvjax.eval.tasks import TASKS
from kvjax.models.bundled import DEFAULT, bundled_models, model_directory
from kvjax.models.published import PUBLISHED
from kvjax.pallas_kernels.targets import TARGETS
from kvjax.train.data.tokenizer import build_tokenizer
from kvjax.train.recipe import bundled_recipes
from tests.eval.synthetic import make_run

NAMES = (*bundled_models(), *PUBLISHED)


def test_overview(kvjax):
    code, out, _ = kvjax("--help")
    assert code == 0 and all(f"  {name} " in out for name in COMMANDS)
    code, out, err = kvjax()
    assert code == 2 and not out and "usage" in err
    assert kvjax("--version")[1].startswith("kvjax 0.")


@pytest.mark.parametrize("name", COMMANDS)
def test_help(kvjax, name):
    code, out, _ = kvjax(name, "--help")
    assert code == 0
    assert COMMANDS[name].summary in out and f"kvjax {name}" in out
    assert "--json" in out and "--debug" in out
    if COMMANDS[name].presets:
        assert all(headline(preset) in out for preset in compressions())


@pytest.mark.parametrize(
    ("name", "known"),
    [
        *((name, NAMES) for name in ("bench", "eval", "generate")),
        ("eval", (*bundled_evaluations(), *TASKS)),
        ("finetune", (*bundled_recipes(), *TARGETS)),
    ],
)
def test_help_lists_what_there_is(kvjax, name, known):
    _, out, _ = kvjax(name, "--help")
    missing = [one for one in known if not re.search(rf"[ (]{one}[,.)]", out)]
    assert not missing


def examples() -> list[str]:
    """The commands that `--help` shows, of all commands."""
    texts = [overview(), *(command.examples for command in COMMANDS.values())]
    lines = "\n".join(texts).replace("\\\n", "").splitlines()
    lines = [re.split(r"(?<=\S) {3,}(?=[^\s-])", line.strip())[0] for line in lines]
    called = [line for line in lines if line.startswith("kvjax ")]
    return list(dict.fromkeys(c for c in called if c.split()[1] in COMMANDS))


@pytest.mark.parametrize("line", examples())
def test_examples_of_the_help_are_valid(line):
    _, name, *words = shlex.split(line)
    given = vars(parse(name, words))
    for c in split(given.get("compression") or ""):
        pick(c, None, given["compression_set" if name == "eval" else "set"])


def test_debug_shows_where(kvjax):
    code, _, err = kvjax("report", "nowhere", "--debug")
    assert code == 2 and "Traceback" in err


def test_unknown_option(kvjax):
    code, _, err = kvjax("report", "x", "--ouut", "y")
    assert code == 2 and "--out" in err


def test_dotted_options():
    assert dotted("generate", ["--compression.a.b", "1", "x"]) == [
        *("--set", "a.b=1", "x")
    ]
    assert dotted("eval", ["--compression.a.b=1", "--compression", "c"]) == [
        *("--compression-set", "a.b=1", "--compression", "c")
    ]


def test_interrupted(kvjax, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS["report"], "run", stop)
    code, _, err = kvjax("report", "x")
    assert code == 130 and "interrupted" in err


def test_report(kvjax, tmp_path):
    run = make_run(tmp_path / "run", ["none", "random"], needle=False)
    code, out, _ = kvjax("report", run, "--json", "--out", tmp_path / "out")
    result = json.loads(out)
    assert code == 0 and len(result["figures"]) >= 5
    assert (tmp_path / "out" / "report.html").is_file()
    code, _, err = kvjax("report", run, "--compare", "random, snapvk")
    assert code == 2 and "no map of 'snapvk'" in err
    code, _, err = kvjax("report", run, "--compare", "random")
    assert code == 2 and "as in snapkv,h2o" in err
    assert not (run / "report").exists()


def test_generate(kvjax, checkpoint, tmp_path):
    (tmp_path / "prompt.txt").write_text("[KQ=ab3d] The sun is low. " * 4)
    words = ["generate", "--model", checkpoint, "--max-new-tokens", 6]
    words += ["--prompt-file", tmp_path / "prompt.txt", "--dtype", "float32"]
    words += ["--compression", "snapkv", "--compression.evict.score.window", 8]
    code, out, err = kvjax(*words, "--json")
    result = json.loads(out)
    assert code == 0 and len(result["tokens"]) <= 6
    assert result["keep"] == 0.25 and result["prompt_tokens"] == 105
    code, text, err = kvjax(*words, "--mesh", "data=1,model=1")
    assert code == 0 and text == result["text"] + "\n"
    assert "105 prompt tokens" in err
    assert kvjax(*words, "--stop", "]")[0] == 0
    code, _, err = kvjax(*words, "--stop", "ab")
    assert code == 2 and "2 tokens" in err
    code, _, err = kvjax(*words, "--chat")
    assert code == 2 and "chat template" in err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a prompt".encode("utf-16"), "prompt.txt begins as UTF-16 text does"),
        ("a prompt".encode("utf-16-le"), "prompt.txt begins as UTF-16-LE text does"),
        (
            "one\ncaf\xe9".encode("latin-1"),
            "prompt.txt, line 2: byte 0xe9 is not UTF-8",
        ),
    ],
)
def test_prompt_files_that_are_not_utf_8(kvjax, tmp_path, content, says):
    (tmp_path / "prompt.txt").write_bytes(content)
    code, _, err = kvjax("generate", "--prompt-file", tmp_path / "prompt.txt")
    assert code == 2 and says in err and "iconv" in err


def test_marks_and_halves_of_pairs_in_prompts(kvjax, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert Generate(prompt_file=path)._text() == "one\ntwo\n"
    assert Generate(prompt="\ufeffone")._text() == "one"
    code, _, err = kvjax("generate", "--prompt", "a\udcff")
    assert code == 2 and "--prompt" in err and "half" in err


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('no users') }}", "TemplateError: no users"),
        ("{{ 1 + 'a' }}", "TypeError"),
    ],
)
def test_a_chat_template_that_refuses_the_prompt(template, says):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"refuses the prompt.*{says}"):
        Generate(prompt="a", chat=True)._encode(tokenizer, "a")


def test_bench(kvjax, checkpoint):
    words = ["bench", "--model", checkpoint, "--length", 64, "--new-tokens", 3]
    words += ["--repeats", 1, "--compression", "none,random", "--json"]
    code, out, _ = kvjax(*words)
    rows = json.loads(out)["rows"]
    assert code == 0 and [row["compression"] for row in rows] == ["none", "random"]
    assert rows[0]["resident_bytes"] > rows[1]["resident_bytes"]
    assert all(row["prefill_ms"] > 0 and row["ms_per_token"] > 0 for row in rows)


def test_calibrate(kvjax, checkpoint, tmp_path):
    """What it writes is a compression of that model."""
    out, small = tmp_path / "tables" / "table.yaml", "block: 16"
    words = ["calibrate", out, "--model", checkpoint, "--length", 200]
    for pattern in ("{type: a_shape, first: 16, local: 16, ", "{type: tri_shape, "):
        words += ["--candidate", pattern + small + "}"]
    code, text, _ = kvjax(*words, "--candidate", "dense", "--retain", 0.9, "--json")
    found = json.loads(text)
    assert code == 0 and found["out"] == str(out)
    assert sum(one["heads"] for one in found["patterns"]) == 8
    assert 0.9 <= found["retained"] <= 1 and 150 < found["tokens"][0] <= 200
    words = ["generate", "--model", checkpoint, "--prompt", "The sun is low.", "--set"]
    words += ["prefill.dense_below=0", "--compression", out, "--max-new-tokens", 2]
    assert kvjax(*words)[0] == 0
    words = ["calibrate", out, "--model", checkpoint, "--candidate", "{type: nothing}"]
    code, _, err = kvjax(*words)
    assert code == 2 and "Unknown prefill 'nothing'" in err


def test_convert(kvjax, checkpoint, tmp_path):
    out = tmp_path / "copy"
    code, text, _ = kvjax("convert", checkpoint, out, "--dtype", "float16", "--json")
    assert code == 0 and "model.safetensors" in json.loads(text)["files"]
    settings = json.loads((out / "config.json").read_text())
    assert "float16" in (settings.get("dtype"), settings.get("torch_dtype"))
    code, _, err = kvjax("convert", checkpoint, out)
    assert code == 2 and "--overwrite" in err
    assert kvjax("convert", checkpoint, out, "--overwrite")[0] == 0


def test_eval_and_report(kvjax, checkpoint, tmp_path):
    words = ["eval", "--model", checkpoint, "--compression", "knorm", "--keep", "0.5"]
    words += ["--tasks", "recall", "--lengths", 160, "--items", 2, "--json"]
    words += ["--visibility", "query_agnostic", "--out", tmp_path / "run"]
    code, out, _ = kvjax(*words)
    result = json.loads(out)
    assert code == 0 and result["resumed_cells"] == 0
    names = {row["compression"] for row in result["rows"]}
    assert names == {"none", "random", "knorm"}
    code, out, _ = kvjax(*words)
    assert json.loads(out)["resumed_cells"] == 3
    code, _, err = kvjax(*words, "--seed", 9)
    assert code == 2 and "seed" in err
    assert kvjax("report", tmp_path / "run")[0] == 0
    code, out, _ = kvjax(*(word for word in words if word != "--json"))
    assert code == 0 and "recall" in out and "knorm" in out and "3 cells" in out


class Letters:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids, **_) -> str:
        """Text, with a mark for half a character."""
        return bytes(ids).decode(errors="replace")


def test_stream_holds_back_half_characters():
    import numpy as np

    file = io.StringIO()
    stream = Stream(Letters(), file, quiet=False)
    ids, seen = list("aé!".encode()), []
    for end in range(1, len(ids) + 1):
        stream(np.array([ids[:end]]), np.array([end]))
        seen.append(file.getvalue())
    stream.close()
    assert seen == ["a", "a", "aé", "aé!"]


def test_json_survives_a_chatty_library(kvjax, monkeypatch):
    def run(self, ui):
        print("loading ...")
        return {"ok": True}

    monkeypatch.setattr(COMMANDS["report"], "run", run)
    code, out, err = kvjax("report", "x", "--json")
    assert code == 0 and json.loads(out) == {"ok": True} and "loading" in err


def test_replies_are_drawn_as_the_checkpoint_says(kvjax, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_directory(DEFAULT), folder)
    given = {"do_sample": True, "temperature": 0.7, "top_k": 5, "typical_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(given))
    ask = ("generate", "--model", folder, "--prompt", "[KQ=ab3d] [", "--json")
    code, _, err = kvjax(*ask, "--max-new-tokens", 2)
    assert code == 0 and "temperature 0.7, top_k 5" in err
    assert "'typical_p': 0.9} is not applied" in err
    code, _, err = kvjax(*ask, "--max-new-tokens", 2, "--temperature", 0)
    assert code == 0 and "temperature" not in err
