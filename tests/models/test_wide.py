"""With 64-bit types on, everything works and nothing inside is wider than it was."""

import json
import subprocess
import sys

import pytest

from tests.small import PRESETS
from tests.tree import ROOT


def wrong(directory, names) -> dict[str, str]:
    """What goes wrong in a process with 64-bit types on."""
    command = [sys.executable, "-m", "tests.models.wide_process", str(directory)]
    done = subprocess.run([*command, *names], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_one_preset(tmp_path):
    assert wrong(tmp_path, ["snapkv_kivi"]) == {}


@pytest.mark.slow
@pytest.mark.sweep(0, 1)
@pytest.mark.parametrize("part", range(4))
def test_every_preset(part, tmp_path):
    assert wrong(tmp_path, PRESETS[part::4]) == {}


@pytest.mark.slow
def test_training_evaluation_and_commands(tmp_path):
    assert wrong(tmp_path, ("train", "eval", "cli")) == {}
