"""`kvjax finetune` around the run: its progress bar, and joining other processes."""

import io
import json
import os
import pathlib
import socket
import subprocess
import sys
import types

import jax
import pytest
import yaml
from rich.console import Console

from kvjax.cli.base import UI
from kvjax.cli.finetune import bar
from kvjax.cli.main import main
from kvjax.train.recipe import Stage, as_tree
from kvjax.train.run import processes
from kvjax.train.run.progress import StepProgress
from tests.train.tiny_run import recipe

ALONE = {
    "JAX_COORDINATOR_ADDRESS": "127.0.0.1:12345",
    "JAX_NUM_PROCESSES": "1",
    "JAX_PROCESS_ID": "0",
}


def shown(terminal: bool, bars: bool) -> str:
    """What a run of six steps, followed by a bar, leaves on stderr."""
    file = io.StringIO()
    err = Console(file=file, force_terminal=terminal, width=100)
    with bar(UI(err=err, json=False, bars=bars), 6) as tell:
        tell(StepProgress(step=1, steps=6, loss=None))
        err.print("a line of the log")
        tell(StepProgress(step=6, steps=6, loss=1.23456))
    return file.getvalue()


def test_the_bar_shows_steps_and_loss_below_the_log():
    text = shown(terminal=True, bars=True)
    assert "a line of the log" in text
    last = text.split("a line of the log")[1]
    assert "loss 1.235" in last and "6/6" in last and "0:00:0" in last


def test_no_bar_where_there_is_no_terminal():
    assert shown(terminal=False, bars=False) == "a line of the log\n"


@pytest.fixture
def calls(monkeypatch) -> list:
    """Calls of `jax.distributed.initialize` and of a run, which are not carried out."""
    made: list = []

    def initialize(*given, **named):
        made.append(("joined", given, named))

    def run(config, directory, *, progress):
        made.append(("ran", config.steps))
        progress(StepProgress(step=config.steps, steps=config.steps, loss=0.5))
        return types.SimpleNamespace(step=config.steps)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr("kvjax.train.run.run", run)
    for name in processes.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return made


def finetune(directory: pathlib.Path, *words: str) -> int:
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(as_tree(recipe())))
    out = directory / "run"
    return main(["finetune", "--config", str(path), "--out", str(out), *words])


def test_a_bar_is_shown_where_it_is_asked_for(calls, tmp_path, capsys):
    assert finetune(tmp_path, "--json", "--progress") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["steps"] == 6 and "loss 0.500" in err and "6/6" in err
    assert finetune(tmp_path, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["steps"] == 6 and not err
    assert calls == [("ran", 6)] * 2  # alone: there is nobody to join


@pytest.mark.parametrize(
    ("variables", "given", "named"),
    [
        ({}, (), {}),  # the cluster tells
        (ALONE, ("127.0.0.1:12345",), {"num_processes": 1, "process_id": 0}),
    ],
    ids=["cluster", "variables"],
)
def test_distributed_joins_before_the_run(
    variables, given, named, calls, tmp_path, monkeypatch
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert finetune(tmp_path, "--distributed") == 0
    assert calls == [("joined", given, named), ("ran", 6)]


@pytest.mark.parametrize(
    "change",
    [
        *({name: ""} for name in processes.VARIABLES),
        {"JAX_NUM_PROCESSES": "two"},
        {"JAX_PROCESS_ID": "-1"},
    ],
    ids=str,
)
def test_variables_that_do_not_say_who_is_there(
    change, calls, tmp_path, monkeypatch, capsys
):
    for name, value in {**ALONE, **change}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS, .* Set all of them"):
        processes.join()
    assert finetune(tmp_path, "--distributed") == 2
    assert "several processes need" in capsys.readouterr().err and not calls


@pytest.mark.slow
def test_a_process_joins_before_it_asks_for_devices(tmp_path):
    """JAX refuses to join once anything has looked at its devices."""
    config = recipe(stages=(Stage(steps=1, lengths={64: 1.0}, tokens_per_step=128),))
    path, out = tmp_path / "tiny.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(as_tree(config)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = ["finetune", "--config", path, "--out", out, "--distributed", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "kvjax.cli", *words],
        env={**os.environ, **ALONE, "JAX_COORDINATOR_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 1
    assert (out / "model" / "config.json").is_file()
