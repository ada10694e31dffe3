"""YAML as it is meant: numbers of YAML 1.2, keys that are numbers, a file's name."""

import errno
import math

import pytest

from kvjax.config import override, parse_assignments
from kvjax.files import parse_yaml, replacing


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("-3", -3),
        ("+3", 3),
        ("1_000", 1000),
        ("0x1F", 31),
        ("0", 0),
        ("1e-3", 0.001),
        ("1e3", 1000.0),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("1.5E+3", 1500.0),
        ("-.inf", -math.inf),
        ("010", "010"),
        ("08", "08"),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("1.2.3", "1.2.3"),
        ("[1, 010]", [1, "010"]),
    ],
)
def test_numbers_are_those_of_yaml_1_2(text, value):
    found = parse_yaml(text, "x")
    assert found == value and type(found) is type(value)


def test_keys_that_are_numbers_go_by_them():
    tree = {"stages": [{"lengths": {64: 1.0}}], "a": {"64": 1}}
    changed = override(tree, {"stages.0.lengths.64": 2.0, "stages.0.lengths.128": 1.0})
    assert changed["stages"][0]["lengths"] == {64: 2.0, 128: 1.0}
    assert override(tree, {"a.64": 2})["a"] == {"64": 2}


@pytest.mark.parametrize("given", ["seed=1", (3,), [None]])
def test_assignments_are_a_list_of_texts(given):
    with pytest.raises(ValueError, match="expected a list of texts"):
        parse_assignments(given)


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(OSError, match=r"a\.txt") as said, replacing(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert said.value.errno == errno.ENOSPC
