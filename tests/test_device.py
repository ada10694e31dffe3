"""tools/device.py: a session on a device goes on whatever a stage does, and on time.

The stages are scripts of three lines here; `test_dry_run` runs the real ones.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
import types
from typing import Any

import pytest

from tests.tree import ROOT, tool

STAGE = """
import json, os, sys, time
stage, first = sys.argv[1], int(sys.argv[sys.argv.index("--first") + 1])

def say(**record):
    print(json.dumps(record), flush=True)

say(about={{"device": "none", "date": "today"}})
for number in range(first, 3):
    say(starts=number, name=f"row {{number}}", silent={silent})
    {what}
    say(row={{"name": f"row {{number}}", "ms": 1.5}})
say(done=True)
"""


@pytest.fixture
def device() -> types.ModuleType:
    return tool("device")


def session(device, monkeypatch, out, *, budget=60.0, silent=60.0, **stages: Any):
    """Exit code of all stages, of which some do what is given between their rows."""

    def command(python, stage, *args):
        what = stages.get(stage, "pass")
        return [python, "-c", STAGE.format(what=what, silent=silent), stage, *args]

    monkeypatch.setattr(device, "command", command)
    args = device.arguments(["--dry", "--out", str(out), "--budget", str(budget)])
    return device.run(args, sys.executable, None)


def read(out, name):
    return json.loads((out / f"{name}.json").read_text(encoding="utf-8"))


def test_every_stage_writes_what_it_found(device, monkeypatch, tmp_path, capsys):
    assert session(device, monkeypatch, tmp_path) == 0
    for stage in device.STAGES:
        record = read(tmp_path, stage)
        assert record["status"] == "done" and record["dry"] is True
        assert (record["device"], record["date"]) == ("none", "today")
        assert [row["name"] for row in record["rows"]] == ["row 0", "row 1", "row 2"]
    assert read(tmp_path, "summary")["stages"].keys() == device.STAGES.keys()
    assert len(list(tmp_path.iterdir())) <= 8
    assert "ms=1.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("what", "silent", "why"),
    [
        ("number != 1 or os.abort()", 60, "code -6"),
        ("number != 1 or time.sleep(60)", 0.4, "hung"),
        ("number != 1 or sys.exit('no such kernel')", 60, "no such kernel"),
    ],
)
def test_a_bad_row_costs_no_other(device, monkeypatch, tmp_path, what, silent, why):
    assert session(device, monkeypatch, tmp_path, silent=silent, card=what) == 1
    record = read(tmp_path, "card")
    assert record["status"] == "done"
    assert [("error" in row) for row in record["rows"]] == [False, True, False]
    assert why in record["rows"][1]["error"]
    assert read(tmp_path, "tune")["status"] == "done"


def test_a_stage_that_cannot_start_is_named(device, monkeypatch, tmp_path):
    command = [sys.executable, "-c", "raise ImportError('no kvjax')"]
    monkeypatch.setattr(device, "command", lambda *_: command)
    args = device.arguments(["--dry", "--out", str(tmp_path)])
    assert device.run(args, sys.executable, None) == 1
    for stage in device.STAGES:
        record = read(tmp_path, stage)
        assert record["status"] == "failed" and "no kvjax" in record["error"]


def test_the_budget_is_kept(device, monkeypatch, tmp_path):
    start = time.monotonic()
    stages: dict[str, Any] = dict.fromkeys(device.STAGES, "time.sleep(60)")
    assert session(device, monkeypatch, tmp_path, budget=1.5, **stages) == 1
    assert time.monotonic() - start < 5
    for stage in device.STAGES:
        record = read(tmp_path, stage)
        assert record["status"] == "out of time"
        assert record["limit_s"] < 1.5


def test_time_that_is_left_goes_to_later_stages(device):
    names = list(device.STAGES)
    assert device.limit("tune", names, 100.0) == 100.0
    early = device.limit("parity", names, 540.0)
    assert device.limit("card", names, 540.0 - early / 2) > 20


def test_a_dry_run_never_replaces_a_measurement(device, tmp_path, capsys):
    (tmp_path / "card.json").write_text(json.dumps({"dry": False, "rows": []}))
    with pytest.raises(SystemExit):
        device.arguments(["--dry", "--out", str(tmp_path)])
    assert "card.json" in capsys.readouterr().err
    device.arguments(["--dry", "--out", str(tmp_path), "--stages", "tune"])
    assert device.DRY_RESULTS != device.RESULTS


# The interpreter.


def found(**more):
    names = tool("device_python").NEEDED.values()
    versions = {name: importlib.metadata.version(name) for name in names}
    base = {"python": [3, 12], "missing": [], "versions": versions}
    return {**base, "platform": "gpu", "kind": "NVIDIA H100", **more}


def test_what_is_missing_is_named_with_the_remedy(monkeypatch, tmp_path):
    python = tool("device_python")
    monkeypatch.setattr(python, "WHEELS", tmp_path)
    there = found(missing=[["safetensors", "No module named 'safetensors'"]])
    del there["versions"]["safetensors"]
    there["versions"]["flax"] = "0.10.2"
    monkeypatch.setattr(python, "look", lambda *_: there)
    with pytest.raises(ValueError) as told:
        python.chosen("python3", False)
    text = str(told.value)
    assert "safetensors is not installed" in text and "flax is 0.10.2" in text
    assert "pip install '" in text and "'safetensors>=" in text
    assert "make device-pack" in text


def test_what_is_carried_is_used(monkeypatch, tmp_path):
    python = tool("device_python")
    (tmp_path / "safetensors-1-py3-none-any.whl").touch()
    monkeypatch.setattr(python, "WHEELS", tmp_path)
    bare = found(missing=[["safetensors", "No module named 'safetensors'"]])
    monkeypatch.setattr(
        python, "look", lambda _, __, site=None: found() if site else bare
    )
    monkeypatch.setattr(python, "installed", lambda _: None)
    assert python.chosen("python3", False)[1] == python.SITE


@pytest.mark.parametrize(
    ("one", "dry", "why"),
    [
        (found(platform="cpu", kind="cpu"), False, "sees no GPU"),
        (found(platform=None, kind="no jax"), True, "no JAX that runs"),
        (found(python=[3, 11]), True, "3.12 is needed"),
        ({"broken": "no such file"}, True, "does not run"),
    ],
)
def test_an_interpreter_is_refused_with_the_reason(monkeypatch, one, dry, why):
    python = tool("device_python")
    monkeypatch.setattr(python, "look", lambda *_: one)
    with pytest.raises(ValueError, match=why):
        python.chosen(None, dry)


IMPORTED = """
import sys
sys.argv = ["device.py"]
sys.path.insert(0, "benchmarks")
import device, pathlib
print(*{name.split(".")[0] for name in sys.modules})
from device_parity import cases
context = device.Context(out=pathlib.Path("nowhere"), dry=False)
stages = set(device.STAGES) - {"parity", "tune"}  # these start or read something
rows = {stage: device.STAGES[stage](context) for stage in stages}
names = {stage: len({name for name, _ in rows[stage]}) for stage in rows}
assert names == {stage: len(rows[stage]) for stage in rows}, "names are told apart"
assert len(rows["decode"]) == 18 and len(cases(False)) > 80, names
"""


def test_all_that_the_stages_import_is_looked_for():
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "nowhere"},  # and no device is asked
    )
    assert done.returncode == 0, done.stderr
    owners = importlib.metadata.packages_distributions()
    imported = {n for m in done.stdout.split() for n in owners.get(m, ())}
    python = tool("device_python")
    declared = set(python.bounds()) & {name.lower() for name in imported}
    assert declared <= set(python.NEEDED.values())
    assert not {"datasets", "transformers", "matplotlib", "torch"} & imported


def test_what_is_carried_is_locked_and_complete():
    pack = tool("device_pack")
    names = pack.closure(["flax", "orbax-checkpoint", "rich"])
    assert {"tensorstore", "msgpack", "etils"} <= set(names)
    assert not pack.WITH_JAX & set(names)
    assert pack.locked(names).count("--hash=sha256:") >= len(names)
    with pytest.raises(ValueError, match="nothing-like-it"):
        pack.locked(["nothing-like-it"])


@pytest.mark.slow
def test_dry_run(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "device.py"), "--dry"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in tool("device").STAGES:
        record = read(tmp_path, stage)
        assert record["dry"] and record["status"] == "done" and record["rows"], stage
        assert not [row for row in record["rows"] if {"error", "skipped"} & set(row)]
