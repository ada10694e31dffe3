"""tools/setup.py: what it says when it cannot, what it skips when it need not."""

import ast
import types

import pytest

from tests.tree import ROOT, tool

SCRIPT = ROOT / "tools" / "setup.py"


@pytest.fixture
def setup() -> types.ModuleType:
    return tool("setup")


def test_runs_on_an_old_python():
    ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 8))


def test_error_lists_what_was_looked_at(setup, monkeypatch):
    places = [("PATH", "python3.12"), ("pyenv", "old/bin/python3.12")]
    found = {"python3.12": None, "old/bin/python3.12": (3, 9)}
    monkeypatch.setattr(setup, "candidates", lambda: iter(places))
    monkeypatch.setattr(setup, "version", found.get)
    with pytest.raises(SystemExit, match=r"(?s)python3.12: not found.*Python 3\.9"):
        setup.find_python()


def test_finds_pyenv_beside_its_shims(setup, monkeypatch, tmp_path):
    monkeypatch.delenv("PYENV_ROOT", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "shims"))
    assert str(tmp_path) in list(setup.pyenv_roots())


def test_does_nothing_when_up_to_date(setup, monkeypatch, tmp_path):
    monkeypatch.setattr(setup, "STAMP", tmp_path / "stamp")
    monkeypatch.setattr(setup, "PYTHON", tmp_path / "python")
    setup.PYTHON.touch()
    setup.STAMP.write_text(setup.fingerprint())
    monkeypatch.setattr(setup.subprocess, "run", None)  # any call would raise
    setup.main()


def test_lock_pins_uv_with_hashes(setup):
    first, *hashes = setup.locked_uv().splitlines()
    assert first.startswith("uv==") and hashes
    assert all("--hash=sha256:" in line for line in hashes)
