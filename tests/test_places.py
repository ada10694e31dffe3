"""Directories to write to: what is refused, and that one process holds one."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

import kvjax
from kvjax.models.bundled import shape_of
from kvjax.places import busy, check_place, clear_left, held
from kvjax.train.data.sources import open_dataset
from kvjax.train.recipe import Source
from kvjax.train.recipe import load_config as load_recipe

PLACES = {
    "file": "is a file",
    "file/a/b": "is a file",
    "loop": "symbolic links",
    "loop/run": "symbolic links",
    "nowhere": "is a link to nowhere",
    "n" * 300: "too long",
    "new/" + "n" * 300: "more than 255 bytes",
    "new/../other": "`..` is below",
    "a\0b": "null byte",
    "shut/run": "nothing may be written",
}
"""Paths that are no directories to write to, and what is said of each."""


@pytest.fixture
def here(tmp_path, monkeypatch) -> pathlib.Path:
    """A directory with what `PLACES` names."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("gone")
    (tmp_path / "shut").mkdir()
    plain = os.access

    def access(path, mode):  # the superuser may write anywhere
        return pathlib.Path(path).name != "shut" and plain(path, mode)

    monkeypatch.setattr(os, "access", access)
    return tmp_path


@pytest.mark.parametrize("name", PLACES, ids=lambda name: name[:12])
def test_no_place_to_write(here, name):
    with pytest.raises(ValueError, match="cannot be written to") as said:
        check_place(here / name)
    assert PLACES[name] in str(said.value) and "--out" in str(said.value)
    assert len(list(here.iterdir())) == 4


def test_places_to_write(here, monkeypatch):
    (here / "link").symlink_to("there")
    (here / "there").mkdir()
    monkeypatch.chdir(here)
    for name in ("new", "new/a/b", "there", "link/new", ".", "there/..", "é" * 120):
        check_place(pathlib.Path(name))


HOLDS = """
import pathlib, sys, time
from kvjax.places import held

with held(pathlib.Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    time.sleep(600)
"""


def test_one_process_holds_a_directory_and_a_kill_lets_go(tmp_path):
    path = tmp_path / "run"
    command = [sys.executable, "-c", HOLDS, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "True\n"
        with held(path) as mine:
            assert not mine and "another run" in str(busy(path))
        other.send_signal(signal.SIGKILL)
    with held(path) as mine:
        assert mine


def test_what_was_made_for_nothing_goes_again(tmp_path):
    with held(tmp_path / "a" / "b") as mine:
        assert mine
        with held(tmp_path / "a" / "b") as again:
            assert not again
    assert not list(tmp_path.iterdir())
    with held(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / ".file.1.tmp").touch()
    clear_left(tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "own").mkdir()
    with held(tmp_path / "own"):
        pass
    assert (tmp_path / "own").is_dir()


@pytest.mark.parametrize("name", ["~nobody-here/x", "a\0b", "x" * 5000, "a/" * 3000])
def test_names_that_no_disk_holds(name, tmp_path):
    calls = [
        lambda: kvjax.load(name),
        lambda: shape_of(name),
        lambda: kvjax.compression(f"{name}.yaml"),
        lambda: load_recipe(f"{name}.yaml"),
        lambda: open_dataset(Source(dataset=f"{name}.jsonl", text="text"), "train"),
    ]
    for call in calls:
        with pytest.raises(ValueError) as said:
            call()
        assert len(str(said.value)) < 1500
