"""Evaluations that are killed anywhere: what is finished stays, and they go on."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest

from kvjax.eval import harness
from kvjax.eval.results import load_rows, open_run
from kvjax.places import held
from tests.eval import tiny
from tests.eval.synthetic import make_rows
from tests.faults.killing import Killed, calls, killed_at

HEADER = {"schema": 3, "model_fingerprint": "abc", "config": {"items": 2}}
ROWS = [
    row | {"items": 1}
    for row in make_rows(["none", "random"], keeps=(0.5,), needle=False)[:2]
]
ITEMS = [{"item": 0, "reply": "a", "answer": "a", "score": 1.0, "agrees": 1.0}]


def evaluate(path: pathlib.Path) -> None:
    """The files of a run, cell by cell, without the run."""
    with held(path) as mine:
        assert mine
        store = open_run(path, HEADER)
        for row in ROWS:
            if store.row({"cell": row["cell"]}, len(ITEMS)) is None:
                store.write(str(row["cell"]), row, ITEMS, {"kept": [[[0]]]})


def test_killed_at_any_call(tmp_path):
    whole = tmp_path / "whole"
    total = calls(whole, lambda: evaluate(whole))
    assert total > 20
    found = set()
    for call in range(total):
        path = tmp_path / f"run{call:03}"
        with pytest.raises(Killed), killed_at(call, path):
            evaluate(path)
        if (path / "run.json").exists():
            done = load_rows(path).num_rows
            json.loads((path / "run.json").read_text())
            found.add(done)
        evaluate(path)
        assert load_rows(path).equals(load_rows(whole))
        assert not list(path.rglob("*.tmp"))
        shutil.rmtree(path)
    assert found == {0, 1, 2}


CHILD = textwrap.dedent(
    """
    import os, signal, sys
    import jax
    from kvjax.eval.harness import run
    from tests.eval import tiny

    left, where = int(sys.argv[2]), sys.argv[1]

    def hook(event, args):
        global left
        if event in ("open", "os.rename") and where in str(args[0]):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    model, words = tiny.model(), tiny.tokenizer()
    sys.addaudithook(hook)
    run(model, words, tiny.config(), where)
    """
)


@pytest.mark.slow
@pytest.mark.sweep(0, 1)
@pytest.mark.parametrize("call", [1, 4, 9, 14, 20, 27])
def test_killed_for_real(tmp_path, repo, call):
    path = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(call)],
        cwd=repo,
        env=os.environ | {"PYTHONPATH": str(repo)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    harness.run(tiny.model(), tiny.tokenizer(), tiny.config(), path)
    assert load_rows(path).num_rows == 5
