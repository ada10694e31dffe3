"""The tables of docs/training.md say what the code does when a field is left out."""

import dataclasses
import re
from typing import Any

import pytest
import yaml

from kvjax.models.config import Evictor
from kvjax.train.recipe import (
    ChunksConfig,
    CompressionChoice,
    DMSConfig,
    DuoConfig,
    LoRAConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SamplingConfig,
    SurrogateConfig,
)

TABLES: dict[str, Any] = {
    "`sampling`": SamplingConfig,
    "a choice": CompressionChoice,
    "`chunks`": ChunksConfig,
    "`lora`": LoRAConfig,
    "`objective`": ObjectiveConfig,
    "`optimizer`": OptimizerConfig,
    "`evictor`": Evictor,
    "`dms`": DMSConfig,
    "`surrogate`": SurrogateConfig,
    "`duo`": DuoConfig,
}
EMPTY = ("none", "the preset's")


def table(text: str, head: str) -> dict[str, str]:
    """Default by field, as the page has them."""
    found = re.search(rf"^\| field of {head} \|.*\n(?:\|.*\n)+", text, re.MULTILINE)
    assert found, head
    rows = [line.split(" | ") for line in found[0].splitlines()[2:]]
    return {row[0].strip("| `"): row[1].strip("` ") for row in rows}


def test_every_table_of_fields_is_compared(repo):
    text = (repo / "docs/training.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| field of (.*?) \|", text, re.MULTILINE)) == set(TABLES)


@pytest.mark.parametrize("head", TABLES)
def test_defaults_are_those_of_the_code(head, repo):
    text = (repo / "docs/training.md").read_text(encoding="utf-8")
    said = table(text, head)
    fields = {field.name: field for field in dataclasses.fields(TABLES[head])}
    assert list(said) == list(fields)
    for name, field in fields.items():
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is dataclasses.MISSING:
            assert said[name] == "needed", name
        elif default in ((), {}):
            assert said[name] in EMPTY, name
        else:
            value = yaml.safe_load(said[name])
            value = tuple(value) if isinstance(value, list) else value
            assert value == default, name
