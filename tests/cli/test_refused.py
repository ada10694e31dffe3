"""What the command line refuses, before it loads or computes anything."""

import os
import pathlib
import subprocess
import sys

import pytest
from jax.errors import JaxRuntimeError

from kvjax.cli.main import main
from tests.eval.synthetic import make_run

HUGE = "1" + "0" * 30


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["evla"], "Did you mean 'eval'"),
        (["eval", "--compression", "snapvk"], "Did you mean 'snapkv'"),
        (["eval", "--config", "dmeo"], "Did you mean 'demo'"),
        (["eval", "--keep", "half"], "--keep needs numbers"),
        (["eval", "--keep", "2"], "fraction kept"),
        (["eval", "--set", "item=3"], "items"),
        (["eval", "--set", "items"], "dotted.path=value"),
        (["eval", "--config", "nowhere.yaml"], "no file at"),
        (["eval", "--compression.evict.score.window"], "needs a value"),
        (["generate"], "--prompt"),
        (["generate", "--prompt", "a", "--set", "evcit.x=1"], "no field"),
        (["generate", "--prompt-file", "nowhere.txt"], "nowhere.txt"),
        (["generate", "--prompt", "a", "--keep", "0.5"], "no token budget"),
        (["generate", "--prompt", "a", "--model", "nowhere"], "nowhere"),
        (["bench", "--repeats", "0"], "--repeats"),
        (["bench", "--compression", "nothing"], "Unknown compression"),
        (["report", "nowhere"], "not a directory"),
        (["convert", "nowhere", "out"], "nowhere"),
        (["generate", "--prompt", ""], "the prompt is empty"),
        (["generate", "--prompt", "a\udcff"], "`--prompt` has U+"),
        (["generate", "--prompt", "a", "--temperature", "nan"], "`--temperature`"),
        (["generate", "--prompt", "a", "--temperature", "1e-30"], "`temperature`"),
        (["generate", "--prompt", "a", "--top-p", "1.5"], "`--top-p`"),
        (["generate", "--prompt", "a", "--top-k", "0"], "`--top-k`"),
        (["generate", "--prompt", "a", "--seed", "-1"], "`--seed`"),
        (["generate", "--prompt", "a", "--max-new-tokens", HUGE], "[1, 2147483647]"),
        (["generate", "--prompt", "a", "--model", "~nobody-here/x"], "home directory"),
        (["generate", "--prompt", "a", "--mesh", "data"], "expected sizes by axis"),
        (["generate", "--prompt", "a", "--mesh", "data=0"], "asks for 0 devices"),
        (["generate", "--prompt", "a", "--mesh", "data=4096"], "4096 devices; there"),
        (["eval", "--mesh", "fsdp=1"], "no axis 'fsdp'; expected some of ['data', 'mo"),
        (["generate", "--prompt-file", "."], "Is a directory"),
        (["bench", "--keep", "0"], "`--keep` must be a number in (0, 1]; got 0.0"),
        (["bench", "--keep", "nan"], "`--keep`"),
        (["bench", "--keep", "-0.5"], "`--keep`"),
        (["bench", "--length", HUGE], "`--length`"),
        (["bench", "--batch", HUGE], "`--batch`"),
        (["bench", "--compression", ","], "--compression names none"),
        (["eval", "--items", HUGE], "`--items` must be an integer in [1, 1000000]"),
        (["eval", "--seed", HUGE], "`--seed`"),
        (["eval", "--lengths", HUGE], "`lengths.0`"),
        (["eval", "--set", "overrides=3"], "--set overrides must be a mapping"),
        (["eval", "--set", "a..b=1"], "'a..b=1'"),
        (["eval", "--set", "a=[1"], "the value of 'a' is not YAML"),
        (["eval", "--set", "=1"], "dotted.path=value"),
        (["demo", "--items", "0"], "`--items`"),
        (["finetune", "--config", "tolerant", "--chips", HUGE], "`--chips`"),
        (["finetune", "--config", "tolerant", "--chips", "8"], "--chips needs both"),
        (["eval", "--items", "2", "--set", "items=3"], "`items` is given twice"),
        (["eval", "--keep", "1", "--set", "keeps.0=0.5"], "`keeps` is given twice"),
        (["eval", "--tasks", "fact", "--set", "tasks=[]"], "`tasks` is given twice"),
        (
            ["eval", "--keep", "0.5", "--compression.evict.budget.keep", "0.25"],
            "`keeps` is given twice: by --keep",
        ),
        (["eval", "--set", "defaults.evict.score.nonsense=3"], "no compression has"),
        (["eval", "--compression", "h2o,h2o"], "lists 'h2o' twice"),
        (["eval", "--visibility", "query_aware,query_aware"], "lists 'query_aware'"),
        (["generate", "--prompt", "a", "--top-k", "5"], "--top-k is of drawing"),
        (["generate", "--prompt", "a", "--seed", "5"], "--seed is of drawing"),
        (["report", ".", "--out", "a" * 300], "no run.json"),
    ],
)
def test_mistakes_are_one_message(kvjax, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    if words[0] == "eval":
        words = [*words, "--model", "nowhere"]
    code, out, err = kvjax(*words)
    assert code == 2 and not out
    assert says in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "--model", "nowhere"],
        ["demo"],
        ["finetune", "--config", "tolerant"],
        ["convert", "nowhere"],
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("out", ["file", "file/run", "loop", "a" * 300, "new/" * 5])
def test_places_that_cannot_be_written_to(kvjax, tmp_path, monkeypatch, words, out):
    """They are refused before a model is loaded."""
    for name in ("convert", "evaluate"):
        monkeypatch.setattr(f"kvjax.cli.{name}.load_model", None)
    monkeypatch.setattr("kvjax.train.run.runner.model_shape", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    if out.startswith("new"):
        out += "a" * 300
    place = [out] if words[0] == "convert" else ["--out", out]
    code, _, err = kvjax(*words, *place)
    assert code == 2 and "cannot be written to as a directory" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_a_directory_of_another_evaluation(kvjax, tmp_path, monkeypatch):
    monkeypatch.setattr("kvjax.cli.evaluate.load_model", None)
    run = make_run(tmp_path / "run", ["none"], needle=False)
    code, _, err = kvjax("eval", "--out", run)
    assert code == 2 and "holds another run" in err and "config." in err


PIPED = """
import os, sys
from kvjax.cli import main
kind, *words = sys.argv[1:]
if kind == "pipe":
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
elif kind == "full":
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
elif kind == "shut":
    sys.stdout = None
elif kind == "both":
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    os.dup2(write, 2)
sys.exit(main(words))
"""


@pytest.mark.parametrize(
    ("kind", "words", "code"),
    [
        ("pipe", ["generate", "--help"], 141),
        ("both", ["nosuch"], 2),
        pytest.param("full", ["--version"], 2, marks=pytest.mark.slow),
        pytest.param("pipe", ["--version"], 141, marks=pytest.mark.slow),
        pytest.param("both", ["--help"], 141, marks=pytest.mark.slow),
        pytest.param("both", ["bench", "--keep", "0"], 2, marks=pytest.mark.slow),
        pytest.param("shut", ["--help"], 0, marks=pytest.mark.slow),
        pytest.param("full", ["eval", "--help"], 2, marks=pytest.mark.slow),
    ],
)
def test_outputs_that_nobody_reads(repo, kind, words, code):
    if kind == "full" and not pathlib.Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    done = subprocess.run(
        [sys.executable, "-c", PIPED, kind, *words],
        cwd=repo,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    lines = done.stderr.strip().splitlines()
    assert len(lines) <= 1 and "Traceback" not in done.stderr


def test_streams_that_are_closed(kvjax, monkeypatch, capsys):
    monkeypatch.setattr("kvjax.cli.generate.load_model", None)
    monkeypatch.setattr("sys.stdin", None)
    code, out, err = kvjax("generate", "--prompt-file", "-")
    assert code == 2 and not out and "standard input is closed" in err
    monkeypatch.setattr("sys.stdout", None)
    for words in (["generate", "--prompt", "a"], ["generate", "--prompt=a", "--json"]):
        assert main(words) == 2
        assert "standard output is closed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            RuntimeError("Unable to initialize backend 'no': x"),
            "JAX_PLATFORMS (here 'no')",
        ),
        (
            JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9 bytes."),
            "Lower the sizes",
        ),
        (JaxRuntimeError("INTERNAL: out of memory\n" + "x" * 999), "Lower the sizes"),
        (MemoryError(), "Lower the sizes"),
        (MemoryError("Unable to allocate 9 GiB"), "allocate 9 GiB"),
    ],
)
def test_devices_and_memory_that_are_missing(kvjax, monkeypatch, wrong, says):
    def fails(*_):
        raise wrong

    monkeypatch.setenv("JAX_PLATFORMS", "no")
    monkeypatch.setattr("kvjax.cli.bench.load_model", fails)
    code, out, err = kvjax("bench")
    assert code == 2 and not out and says in err
    assert len(err.splitlines()) == 1 and len(err) < 700


def test_a_fault_of_this_package_is_no_message(kvjax, monkeypatch):
    def fails(*_):
        raise RuntimeError("a fault")

    monkeypatch.setattr("kvjax.cli.bench.load_model", fails)
    with pytest.raises(RuntimeError, match="a fault"):
        kvjax("bench")


def test_nobody_has_a_home(monkeypatch):
    import jax

    from kvjax.cli import base

    told = {}
    monkeypatch.setattr(jax.config, "update", lambda name, to: told.update({name: to}))
    for name in ("JAX_COMPILATION_CACHE_DIR", "KVJAX_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    base.compile_cache()
    assert not told  # programs are not kept
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    base.compile_cache()
    assert told["jax_compilation_cache_dir"] == "/somewhere/kvjax/jax"


def test_a_terminal_that_does_not_know_a_character(tmp_path):
    run = make_run(tmp_path / "run", ["none", "random"], keeps=(0.5,), needle=False)
    code = (
        "from kvjax.cli import main, tables;"
        "from kvjax.eval.report.run import load_run;"
        "from rich.console import Console; main([]);"
        f"tables.print_scores(Console(), load_run({str(run)!r}).rows)"
    )
    for encoding, sign in (("ascii", b"\\xb1"), ("utf-8", "±".encode())):
        ran = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
        )
        assert ran.returncode == 0 and sign in ran.stdout, ran.stderr
