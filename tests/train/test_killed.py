"""Runs that are killed go on bit for bit."""

import json
import pathlib
import signal
import subprocess
import sys

import pytest

from kvjax.models.io import load
from kvjax.train.data.words import words_of
from kvjax.train.run import run
from kvjax.train.run.exported import check_exported
from kvjax.train.run.model import weights_of
from kvjax.train.run.runner import _export
from kvjax.train.run.stored import steps_in
from tests.faults.killing import Killed, calls, killed_at
from tests.train.tiny_run import RECIPES, recipe
from tests.train.whole_run import goes_on


def kill(directory: pathlib.Path, fault: str, name: str, repo: pathlib.Path) -> None:
    """Run a recipe in a process of its own, which `fault` ends."""
    command = [sys.executable, "-m", "tests.train.tiny_run", directory, fault, name]
    died = subprocess.run(command, cwd=repo, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()[-2000:]


@pytest.mark.parametrize(
    ("fault", "kept"),
    [
        ("rename:4", [2]),
        pytest.param("write:4", [2], marks=pytest.mark.slow),
        pytest.param("step:5", [2, 4], marks=pytest.mark.slow),
        pytest.param("remove", [4, 6], marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed(fault, kept, whole, tmp_path, repo):
    kill(tmp_path, fault, "plain", repo)
    left = steps_in(tmp_path / "checkpoints")
    assert left == ([2, *kept] if fault == "remove" else kept)
    goes_on(whole, tmp_path)


@pytest.mark.slow
@pytest.mark.sweep(0, 1)
@pytest.mark.parametrize("name", ["compressed", "low_rank"])
def test_killed_in_the_midst_of_an_update(name, tmp_path, repo):
    """Of two batches, under sampled compressions; other ones before and behind it."""
    config, directory = RECIPES[name](), tmp_path / "whole"
    whole = run(config, directory), directory
    drawn = drawn_in(directory)
    assert len(set(drawn[:3])) > 1 and len(set(drawn[3:])) > 1
    killed = tmp_path / "killed"
    kill(killed, "step:4", name, repo)
    assert steps_in(killed / "checkpoints") == [3]
    goes_on(whole, killed, config)
    assert drawn_in(killed) == drawn


@pytest.fixture(scope="module")
def export(whole):
    """Writes the finished model of the whole run into a directory, `model` in it."""
    config = recipe()
    weights, _ = weights_of(config)
    words = words_of(config)
    return lambda path: _export(config, weights, whole[0], words, (), path / "model")


def files(path: pathlib.Path) -> dict[str, bytes]:
    found = [one for one in (path / "model").iterdir() if one.is_file()]
    return {one.name: one.read_bytes() for one in found}


def killed_export(export, path: pathlib.Path, call: int) -> None:
    """Of a model that is there, from a certain call on; then it is written again."""
    export(path)
    before = files(path)
    with pytest.raises(Killed), killed_at(call, path):
        export(path)
    check_exported(path, resumes=True)
    export(path)
    check_exported(path, resumes=True)
    left = files(path)
    assert {name: left[name] for name in before} == before
    load(path / "model", "float32")


@pytest.mark.parametrize("part", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_killed_while_the_model_is_written(export, tmp_path, part):
    export(tmp_path)
    total = calls(tmp_path, lambda: export(tmp_path))
    killed_export(export, tmp_path, round(part * (total - 1)))


@pytest.mark.slow
def test_killed_anywhere_while_the_model_is_written(export, tmp_path):
    export(tmp_path)
    for call in range(calls(tmp_path, lambda: export(tmp_path))):
        killed_export(export, tmp_path, call)


@pytest.mark.slow
@pytest.mark.sweep(0, 1)
@pytest.mark.parametrize("call", [3, 10, 20, 35, 50, 65, 80])
def test_killed_at_some_call(call, whole, tmp_path, repo):
    """To the file system below the run's directory, whoever makes it."""
    path = tmp_path / "run"
    kill(path, f"call:{call}", "plain", repo)
    goes_on(whole, path)


def drawn_in(directory: pathlib.Path) -> list[str]:
    """The compression of every step in the log."""
    lines = (directory / "log.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [e["compression"] for e in events if "width" in e]
