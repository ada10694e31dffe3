"""A worker that dies fails its test, and the run ends all the same."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

CONFTEST = "from tests.workers import pytest_xdist_make_scheduler\n"
DIES = """
import os

def test_before(): pass
def test_dies(): os.abort()
def test_after(): pass
def test_last(): pass
"""
SHORT = """
import time

def test_short(): time.sleep(0.2)
"""


def test_a_worker_that_dies_fails_one_test(tmp_path):
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {ROOT}\n")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_0.py").write_text(DIES)
    for number in range(1, 6):
        (tmp_path / f"test_{number}.py").write_text(SHORT)
    plain = ["-p", "no:cacheprovider", "-p", "no:faulthandler", "-q", "-n", "2"]
    spread = ["--dist", "loadfile", "--no-loadscope-reorder"]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *plain, *spread, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "test_0.py::test_dies" in ran.stdout
    assert "1 failed, 8 passed" in ran.stdout.splitlines()[-1], ran.stdout
    assert ran.returncode == 1
