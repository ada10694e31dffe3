"""The demo end to end, on the model that is bundled."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from kvjax.cli import main
from tests.tree import ROOT

BUNDLED = ROOT / "kvjax" / "configs" / "model" / "kvjax-tiny" / "model.safetensors"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BUNDLED.is_file(), reason="the bundled model is not there"),
]


def test_demo(capsys, tmp_path):
    code = main(["demo", "--items", "2", "--out", str(tmp_path / "run"), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert code == 0
    assert {"none", "random"} < {row["compression"] for row in result["rows"]}
    own = [row for row in result["trained_rows"]["dms"] if row["compression"] == "dms"]
    assert {row["keep"] for row in own} == {0.25, 0.125}
    assert (tmp_path / "run" / "report" / "report.html").stat().st_size > 100_000
    code = main(["demo", "--items", "2", "--out", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert code == 0 and "snapkv" in out and "report.html" in out and " -> " in out
    assert "kvjax-tiny-tolerant" in out and "kvjax-tiny-dms" in out
    assert "delete" in out  # says that nothing was measured anew


def test_interrupted_run_goes_on(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "kvjax.cli", "eval", "--items", "2", "--out", run]
    command += ["--tasks", "recall,chain", "--compression", "snapkv", "--json"]
    # Shells start background jobs with SIGINT ignored, which children inherit.
    ignored = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        # A process group of its own: the signal is for this process alone.
        child = subprocess.Popen(
            command, start_new_session=True, stderr=subprocess.PIPE
        )
    finally:
        signal.signal(signal.SIGINT, ignored)
    until = time.monotonic() + 240
    while not list(run.glob("rows/*.parquet")) and time.monotonic() < until:
        time.sleep(0.1)
    os.kill(child.pid, signal.SIGINT)
    assert b"interrupted" in child.communicate(timeout=120)[1]
    assert child.returncode == 130
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed_cells"] >= 1
