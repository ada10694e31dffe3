"""Run directories: atomic writes, resumption, and damage that is named."""

import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest

from kvjax.eval import harness, reading
from kvjax.eval.results import load_rows, open_run
from tests.eval import tiny

HEADER = {"schema": 3, "model_fingerprint": "abc", "config": {"items": 4, "keeps": [1]}}


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody interrupted."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    rows = harness.run(tiny.model(), tiny.tokenizer(), tiny.config(), path)
    return path, rows


def measured(rows):
    names = ("cell", "score", "agreement", "resident_bytes", "full_bytes")
    return [tuple(row[name] for name in names) for row in rows]


KILLED = textwrap.dedent(
    """
    import os, signal, sys
    import jax
    from kvjax.eval.harness import run
    from tests.eval import tiny

    def die(state):
        if state.done == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    run(tiny.model(), tiny.tokenizer(), tiny.config(), sys.argv[1], progress=die)
    """
)


def test_a_killed_run_goes_on(whole, tmp_path, repo):
    path = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path)],
        cwd=repo,
        env=os.environ | {"PYTHONPATH": str(repo)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = {file: file.stat().st_mtime_ns for file in (path / "rows").iterdir()}
    assert len(left) == 2
    states = []
    rows = harness.run(
        tiny.model(), tiny.tokenizer(), tiny.config(), path, progress=states.append
    )
    assert [state.resumed for state in states] == [True, True, False, False, False]
    assert {file: file.stat().st_mtime_ns for file in left} == left
    assert measured(rows) == measured(whole[1])


@pytest.mark.parametrize("cells", [1, 4])
def test_a_run_stops_where_the_callback_raises(whole, tmp_path, cells):
    def stop(state):
        if state.done == cells:
            raise Stop

    fields = (tiny.model(), tiny.tokenizer(), tiny.config(), tmp_path / "run")
    with pytest.raises(Stop):
        harness.run(*fields, progress=stop)
    assert load_rows(tmp_path / "run").num_rows == cells
    assert measured(harness.run(*fields)) == measured(whole[1])


def test_nothing_is_computed_when_all_is_there(whole, monkeypatch):
    monkeypatch.setattr(reading, "read_prompt", None)
    path, rows = whole
    again = harness.run(tiny.model(), tiny.tokenizer(), tiny.config(), path)
    assert again == rows


def test_another_evaluation_is_refused(whole):
    path, _ = whole
    with pytest.raises(ValueError, match="config.items is 5 there and 6 now"):
        harness.run(tiny.model(), tiny.tokenizer(), tiny.config(items=6), path)
    other = tiny.model(norm_eps=1e-3)
    with pytest.raises(ValueError, match=r"model_fingerprint is .*another directory"):
        harness.run(other, tiny.tokenizer(), tiny.config(), path)


def test_other_directories_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run.json"):
        load_rows(tmp_path)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        open_run(file, HEADER)
    with pytest.raises(ValueError, match="not empty"):
        open_run(tmp_path, HEADER)
    file.rename(tmp_path / "run.json")
    with pytest.raises(ValueError, match="not JSON"):
        open_run(tmp_path, HEADER)
    (tmp_path / "run.json").write_text(json.dumps({**HEADER, "schema": 7}))
    for use in (load_rows, lambda path: open_run(path, HEADER)):
        with pytest.raises(ValueError, match="schema 7; this version reads 3"):
            use(tmp_path)


def test_a_truncated_file_is_named(whole, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(whole[0], path)
    victim = sorted((path / "rows").iterdir())[1]
    victim.write_bytes(victim.read_bytes()[:-20])
    for use in (
        load_rows,
        lambda path: harness.run(tiny.model(), tiny.tokenizer(), tiny.config(), path),
    ):
        with pytest.raises(ValueError, match=f"{victim.name}.*Delete it"):
            use(path)
    victim.unlink()
    next((path / "items").iterdir()).unlink()  # its cell runs again
    rows = harness.run(tiny.model(), tiny.tokenizer(), tiny.config(), path)
    assert measured(rows) == measured(whole[1])
    shutil.copy(next((path / "items").iterdir()), victim)
    with pytest.raises(ValueError, match=f"{victim.name} does not hold"):
        load_rows(path)


def test_a_full_disk_keeps_what_is_finished(whole, tmp_path, monkeypatch):
    fields = (tiny.model(), tiny.tokenizer(), tiny.config(), tmp_path / "run")
    sync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 5:  # run.json, three files of `none`, a map
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left.*Finished cells are kept") as info:
        harness.run(*fields)
    assert info.value.errno == errno.ENOSPC
    assert pathlib.Path(info.value.filename).parent == tmp_path / "run" / "items"
    monkeypatch.undo()
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert load_rows(tmp_path / "run").num_rows == 1
    assert measured(harness.run(*fields)) == measured(whole[1])


def test_left_over_temporary_files_are_removed(tmp_path):
    open_run(tmp_path / "run", HEADER)
    left = tmp_path / "run" / "rows" / ".cell.parquet.1.tmp"
    left.write_bytes(b"half")
    open_run(tmp_path / "run", HEADER)
    assert not left.exists()
    assert load_rows(tmp_path / "run").num_rows == 0
