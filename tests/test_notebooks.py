"""Notebooks run from their first cell to their last."""

import pathlib

import jupytext
import nbclient
import pytest

from tests.tree import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
BUNDLED = ROOT / "kvjax" / "configs" / "model" / "kvjax-tiny" / "model.safetensors"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_short(path: pathlib.Path):
    book = jupytext.read(path)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert len(code) <= 12
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 170
    first = book.cells[0]
    assert first.cell_type == "markdown"
    assert "Hardware" in first.source and "Run time" in first.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_becomes_an_ipynb(path: pathlib.Path):
    """As `make notebooks` writes it; no cell is lost."""
    book = jupytext.read(path)
    again = jupytext.reads(jupytext.writes(book, fmt="ipynb"), fmt="ipynb")
    assert [c.source for c in again.cells] == [c.source for c in book.cells]
    assert again.metadata["kernelspec"]["name"] == "python3"


@pytest.mark.slow
@pytest.mark.skipif(not BUNDLED.is_file(), reason="the bundled model is not there")
# The kernel's client still opens its loop and sockets the old way.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: pathlib.Path, monkeypatch, tmp_path):
    monkeypatch.setenv("SMOKE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    book = jupytext.read(path)
    client = nbclient.NotebookClient(book, timeout=300, resources={})
    done = client.execute(cwd=str(tmp_path))
    images = [
        output
        for cell in done.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert len(images) >= 3, "no token map was shown"
