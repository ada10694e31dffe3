"""Runs that are killed go on bit for bit."""

import json
import pathlib
import signal
import subprocess
import sys

import pytest

from kvjax.train.run import run
from kvjax.train.run.stored import steps_in
from tests.train.tiny_run import RECIPES
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


def drawn_in(directory: pathlib.Path) -> list[str]:
    """The compression of every step in the log."""
    lines = (directory / "log.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [e["compression"] for e in events if "width" in e]
