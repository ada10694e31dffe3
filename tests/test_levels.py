"""The levels: what a run leaves out, and that no case is left out for ever."""

import pathlib
from typing import Any

import pytest

from tests.levels import beyond, drawn, leaves_out, longest_first


class Item:
    """As much of a test as the levels look at."""

    def __init__(self, nodeid: str, **marks: Any):
        self.nodeid, self.path = nodeid, pathlib.Path(nodeid.split("::")[0])
        self.marks = {name: getattr(pytest.mark, name) for name in marks if marks[name]}
        if "sweep" in marks:
            self.marks["sweep"] = marks["sweep"]

    def get_closest_marker(self, name: str):
        mark = self.marks.get(name)
        return mark.mark if mark is not None else None


def cases(count: int, **marks: Any) -> list[Any]:
    return [Item(f"tests/a.py::test[{i}]", **marks) for i in range(count)]


def test_a_sweep_gives_each_level_its_share():
    items = cases(30, sweep=pytest.mark.sweep(2, 5))
    fast, ci = (drawn(items, "tree", level) for level in ("fast", "ci"))
    assert len(fast) == 2 and len(ci) == 5 and fast < ci
    assert drawn(items[::-1], "tree", "fast") == fast
    left = [item for item in items if not leaves_out(item, "fast", fast)]
    assert {item.nodeid for item in left} == fast


def test_all_cases_come_up_in_time():
    items = cases(30, sweep=pytest.mark.sweep(2, 5))
    seen = set().union(*(drawn(items, f"commit {n}", "ci") for n in range(40)))
    assert seen == {item.nodeid for item in items}


def test_kinds_are_drawn_apart():
    items = [
        Item(f"tests/a.py::test[{kind}-{i}]", sweep=pytest.mark.sweep(0, 3, kind=kind))
        for kind in "xy"
        for i in range(9)
    ]
    found = drawn(items, "tree", "ci")  # type: ignore[arg-type]
    assert sum("[x" in nodeid for nodeid in found) == 3 == len(found) / 2
    assert not drawn(items, "tree", "fast")  # type: ignore[arg-type]


def test_slow_cases_are_not_drawn_where_slow_tests_are_not_run():
    items = cases(4, slow=True, sweep=pytest.mark.sweep(2, 2))
    assert not drawn(items, "tree", "fast")
    assert len(drawn(items, "tree", "ci")) == 2


@pytest.mark.parametrize("mark", ["slow", "interpret"])
def test_marks_keep_tests_from_the_fast_level(mark):
    (item,) = cases(1, **{mark: True})
    assert beyond(item, "fast") and not beyond(item, "ci")
    (item,) = cases(1)
    assert not beyond(item, "fast")


def test_longest_files_come_first(monkeypatch, tmp_path):
    times = tmp_path / "times.json"
    times.write_text('{"tests/a.py::test": 1.0, "tests/b.py::test": 2.5}')
    monkeypatch.setattr("tests.levels.TIMES", times)
    items: list[Any] = [*cases(2), Item("tests/b.py::test"), *cases(1)]
    longest_first(items)
    assert [str(item.path) for item in items] == ["tests/a.py"] * 3 + ["tests/b.py"]
    items.append(Item("tests/new.py::test"))
    longest_first(items)
    assert str(items[0].path) == "tests/new.py"
