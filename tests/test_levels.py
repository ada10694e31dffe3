"""The levels: what a run leaves out, and that no case is left out for ever."""

import pathlib
from typing import Any

import pytest

from tests.levels import LONG, TURNS, beyond, drawn, longest_first


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


@pytest.fixture(autouse=True)
def recorded(monkeypatch, tmp_path) -> pathlib.Path:
    """What is known of tests' times: nothing at first."""
    times = tmp_path / "times.json"
    monkeypatch.setattr("tests.levels.TIMES", times)
    return times


def names(items: list[Any]) -> set[str]:
    return {item.nodeid for item in items}


def test_a_sweep_gives_each_level_its_share():
    items = cases(30, sweep=pytest.mark.sweep(2, 5))
    fast, ci = (drawn(items, "tree", level) for level in ("fast", "ci"))
    assert len(fast) == 2 and len(ci) == 5 and names(fast) < names(ci)
    assert names(drawn(items[::-1], "tree", "fast")) == names(fast)


def test_all_cases_come_up_in_time():
    items = cases(30, sweep=pytest.mark.sweep(2, 5))
    seen = set().union(*(names(drawn(items, f"{n}", "ci")) for n in range(40)))
    assert seen == names(items)


def test_kinds_are_drawn_apart():
    items: list[Any] = [
        Item(f"tests/a.py::test[{kind}-{i}]", sweep=pytest.mark.sweep(0, 3, kind=kind))
        for kind in "xy"
        for i in range(9)
    ]
    found = names(drawn(items, "tree", "ci"))
    assert sum("[x" in nodeid for nodeid in found) == 3 == len(found) / 2
    assert not drawn(items, "tree", "fast")


def test_slow_cases_are_not_drawn_where_slow_tests_are_not_run():
    items = cases(4, slow=True, sweep=pytest.mark.sweep(2, 2))
    assert not drawn(items, "tree", "fast")
    assert len(drawn(items, "tree", "ci")) == 2


@pytest.mark.parametrize("count", [1, 7])
def test_cases_of_a_long_test_take_turns(recorded, count):
    """In the order of the files, and none of them waits for ever."""
    items = cases(count)
    assert drawn(items, "tree", "fast") == items
    recorded.write_text(f'{{"tests/a.py::test": {LONG / count}}}')
    draws = [drawn(items, f"{n}", "fast") for n in range(100)]
    some = count // TURNS["fast"]
    assert {len(found) for found in draws} == {some, some + 1}
    assert set().union(*map(names, draws)) == names(items)
    assert all(found == [i for i in items if i in found] for found in draws)
    recorded.write_text(f'{{"tests/a.py::test": {0.9 * LONG / count}}}')
    assert drawn(items, "tree", "fast") == items


@pytest.mark.parametrize("mark", ["slow", "interpret"])
def test_marks_keep_tests_from_the_fast_level(mark):
    (item,) = cases(1, **{mark: True})
    assert beyond(item, "fast") and not beyond(item, "ci")
    (item,) = cases(1)
    assert not beyond(item, "fast")


def test_longest_files_come_first(recorded):
    recorded.write_text('{"tests/a.py::test": 1.0, "tests/b.py::test": 2.5}')
    items: list[Any] = [*cases(2), Item("tests/b.py::test"), *cases(1)]
    longest_first(items)
    assert [str(item.path) for item in items] == ["tests/a.py"] * 3 + ["tests/b.py"]
    items.append(Item("tests/new.py::test"))
    longest_first(items)
    assert str(items[0].path) == "tests/new.py"
