"""docs/kernels: every op has a page and a figure, and they are current."""

import importlib
import inspect

import pytest

from kvjax.pallas_kernels.registry import OPS
from tests.tree import ROOT, tool

FOLDER = ROOT / "docs" / "kernels"


@pytest.mark.parametrize("name", OPS)
def test_the_page_is_current(name):
    page = FOLDER / f"{name}.md"
    assert page.is_file(), "run `python tools/kernel_pages.py`"
    text = page.read_text(encoding="utf-8")
    assert text == tool("kernel_pages").page(name), "run `python tools/kernel_pages.py`"
    for heading in ("## Cost model", "## Signature", "## Refusals"):
        assert f"\n{heading}\n" in text, heading
    call = getattr(importlib.import_module(f"kvjax.pallas_kernels.{name}"), name)
    for parameter in inspect.signature(call).parameters:
        assert f"| `{parameter}` |" in text, f"{parameter} is not documented"


@pytest.mark.parametrize("name", OPS)
def test_the_figure_is_current(name):
    figures = tool("kernel_figures")
    assert name in figures.FIGURES, "draw it in tools/kernel_figures.py"
    path = FOLDER / "figures" / f"{name}.svg"
    want = figures.FIGURES[name]().svg()
    assert path.read_text(encoding="utf-8") == want, "run `tools/kernel_figures.py`"
    assert f"figures/{name}.svg" in (FOLDER / f"{name}.md").read_text(encoding="utf-8")


def test_the_index_lists_every_op():
    text = (FOLDER / "index.md").read_text(encoding="utf-8")
    assert not [name for name in OPS if f"]({name}.md)" not in text]
