"""The documentation that is derived from the code is current, and complete."""

import dataclasses
import importlib.util
import pathlib
import re

import pytest

from kvjax.compress.presets import COMPONENTS, compressions, describe


def load_tool(repo: pathlib.Path):
    spec = importlib.util.spec_from_file_location("methods", repo / "tools/methods.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_methods_is_current(repo):
    tool = load_tool(repo)
    assert tool.PAGE.read_text() == tool.page(), "run `python tools/methods.py`"


@pytest.mark.parametrize("name", compressions())
def test_presets_say_where_they_come_from(name):
    text = describe(name)
    if name != "none":
        assert re.search(r"^(Source|No source): ", text, re.MULTILINE), text


@pytest.mark.parametrize(
    "component",
    [cls for known in COMPONENTS.values() for cls in known.values()],
    ids=lambda cls: cls.__name__,
)
def test_components_document_their_fields(component):
    """Every field of a component is explained where the class is defined."""
    text = "\n".join(base.__doc__ or "" for base in component.__mro__)
    for field in dataclasses.fields(component):
        assert re.search(rf"\b{field.name}\b.*: ", text), field.name
