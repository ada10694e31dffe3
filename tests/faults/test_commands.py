"""Command lines and YAML files with mistakes: a message each time, no traceback."""

import contextlib
import fnmatch
import io
import pathlib
import random

import pytest
import yaml

from kvjax.cli.main import main
from kvjax.eval import harness
from kvjax.places import check_place
from kvjax.train.data.sampling import check_choices
from kvjax.train.run.directory import check_directory
from kvjax.train.run.logs import check_writers
from kvjax.train.run.model import check_shape, model_shape
from tests.eval import tiny
from tests.eval.harness_tasks import write_tasks
from tests.eval.synthetic import make_run
from tests.faults.commands import (
    evaluation,
    lines,
    odd_bytes,
    odd_line,
    odd_tree,
    trees,
)

STOPPED = "stopped here"
KNORM = "evict: {score: knorm, budget: {type: uniform, keep: 0.5}}\n"
COMMANDS = (
    *("generate", "bench", "eval", "lm-eval", "finetune", "report", "convert"),
    "demo",
)


def _stop(*_, **__):
    raise ValueError(STOPPED)


class Known:
    """Tasks of the folder, without the thousands of the harness and without data."""

    def __init__(self, include_defaults=True, include_path="", metadata=None):
        files = pathlib.Path(include_path).glob("*.yaml") if include_path else ()
        self.task_index = self.all_tasks = [file.stem for file in files]

    def match_tasks(self, names):
        return [name for name in self.task_index if fnmatch.filter([name], names[0])]

    def load(self, names):
        """Nothing."""


class Nothing:
    """Runs no cell."""

    def __init__(self, model, made, store, progress):
        self.rows = []

    def group(self, group):
        """All of it is checked by now."""


def _train(config, directory, *, progress):
    """What a run checks before it loads anything."""
    check_directory(directory)
    check_writers(config.log)
    check_choices(config)
    check_shape(config, model_shape(config))
    _stop()


def _report(directory, out, compare=None):
    from kvjax.eval.report.run import load_run

    load_run(directory)
    check_place(pathlib.Path(out or directory))
    _stop()


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> pathlib.Path:
    """Files that valid command lines name."""
    path = tmp_path_factory.mktemp("here")
    (path / "own.yaml").write_text(KNORM)
    (path / "eval.yaml").write_text(yaml.safe_dump(evaluation(path)))
    (path / "recipe.yaml").write_text(yaml.safe_dump(trees_of("finetune", path)))
    make_run(path / "run", ["none"], keeps=(0.5,), needle=False)
    write_tasks(path / "tasks")
    return path


def trees_of(kind: str, path: pathlib.Path):
    draw = random.Random(0)
    while True:
        found, tree = trees(path, draw)
        if found == kind:
            return tree


@pytest.fixture(autouse=True)
def _dry(monkeypatch, tmp_path):
    """Nothing is loaded or computed; files go to a directory of the test's own."""
    loaded = tiny.model(), tiny.tokenizer()
    for name in ("bench", "convert", "evaluate", "generate", "lm_eval"):
        monkeypatch.setattr(f"kvjax.cli.{name}.load_model", lambda *_: loaded)
    monkeypatch.setattr("kvjax.models.inference.prefill", _stop)
    monkeypatch.setattr("kvjax.models.io.save", _stop)
    monkeypatch.setattr("kvjax.eval.report.write_report", _report)
    monkeypatch.setattr("kvjax.cli.demo.evaluate", _stop)
    monkeypatch.setattr("lm_eval.simple_evaluate", _stop)
    monkeypatch.setattr("kvjax.eval.lm_eval.running.Tasks", Known)
    monkeypatch.setattr("kvjax.train.run.run", _train)
    monkeypatch.setattr(harness, "_Runner", Nothing)
    deep = tmp_path / "a" / "b" / "c"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)


def outcome(words: list[str]) -> tuple[int, str]:
    """Exit code and message, which must be one."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    said = err.getvalue()
    assert code in (0, 1, 2), words
    assert "Traceback" not in said + out.getvalue(), words
    if code:
        assert len(said) > 10 and len(said) < 3000, (words, said)
        assert "\n\n" not in said.strip(), (words, said)
    return code, said


@pytest.mark.parametrize("name", COMMANDS)
def test_valid_command_lines(here, name):
    code, said = outcome([name, *lines(here)[name]])
    assert code == 0 or STOPPED in said, said


def mistaken(here: pathlib.Path, name: str, draw: random.Random) -> None:
    outcome([name, *odd_line(lines(here)[name], draw)])


@pytest.mark.parametrize("name", COMMANDS)
def test_mistakes_in_command_lines(here, name):
    draw = random.Random(f"{name} 20261128")
    for _ in range(30 if name in ("generate", "eval", "bench") else 20):
        mistaken(here, name, draw)


def file_words(kind: str, file: pathlib.Path) -> list[str]:
    if kind == "compression":
        return ["bench", "--compression", str(file), "--length", "64"]
    return [kind, "--config", str(file), "--out", "out"]


def mistaken_file(here: pathlib.Path, file: pathlib.Path, draw: random.Random) -> None:
    kind, tree = trees(here, draw)
    text = yaml.dump(tree, sort_keys=False)
    if draw.random() < 0.6:
        data = yaml.dump(odd_tree(tree, draw), sort_keys=False).encode()
    else:
        data = odd_bytes(text, draw)
    file.write_bytes(data)
    try:
        outcome(file_words(kind, file))
    except BaseException as wrong:
        wrong.add_note(f"{kind}: {data[:1500]!r}")
        raise


@pytest.mark.parametrize("seed", range(2))
def test_mistakes_in_files(here, tmp_path, seed):
    draw = random.Random(f"{seed} 20261128")
    for _ in range(40):
        mistaken_file(here, tmp_path / "file.yaml", draw)


@pytest.mark.slow
@pytest.mark.sweep(0, 1)
@pytest.mark.parametrize("name", [*COMMANDS, "files"])
def test_many_mistakes(here, tmp_path, name):
    draw = random.Random(f"{name} many")
    for _ in range(600):
        if name == "files":
            mistaken_file(here, tmp_path / "file.yaml", draw)
        else:
            mistaken(here, name, draw)
