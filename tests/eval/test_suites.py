"""Suites of tasks, and fields set from the command line."""

import pytest

from kvjax.cli.evaluate import Eval
from kvjax.cli.main import parse
from kvjax.eval.config import TEXT, TaskEntry
from kvjax.eval.methods import methods
from kvjax.eval.suites import suite, suites, with_fields
from kvjax.eval.tasks import TASKS


def configured(words):
    command = parse("eval", words)
    assert isinstance(command, Eval)
    return command.configured()


def test_ruler_goes_without_files_that_are_not_there(caplog, tmp_path):
    names = [entry.title for entry in suite("ruler")]
    assert len(names) == 11 and "qa_1" not in names
    assert "suite ruler goes without qa_1" in caplog.text
    fields = {"qa_1": {"path": str(tmp_path / "squad.json")}}
    assert "qa_1" in [entry.title for entry in suite("ruler", fields)]


def test_texts_of_a_suite_are_given():
    assert "novel" not in [entry.title for entry in suite("tolerance")]
    fields = {"novel": {"path": "novel.txt"}}
    assert "novel" in [entry.title for entry in suite("tolerance", fields)]


@pytest.mark.parametrize("name", suites())
def test_suites_name_tasks(name, monkeypatch):
    monkeypatch.setattr("kvjax.eval.suites._lacks", lambda entry: "")
    assert all(entry.name in (*TASKS, TEXT) for entry in suite(name))


def test_fields_are_those_of_the_tasks_that_have_them():
    entries = [TaskEntry(name="niah_single_2"), TaskEntry(name="vt")]
    set_ = with_fields(entries, {"*": {"queries": 2}, "vt": {"hops": 2}})
    assert [entry.fields for entry in set_] == [{"queries": 2}, {"hops": 2}]
    with pytest.raises(ValueError, match="'vtt', which is not asked.*'vt'"):
        with_fields(entries, {"vtt": {"hops": 2}})
    with pytest.raises(ValueError, match="no task that is asked has a field 'hopps'"):
        with_fields(entries, {"*": {"hopps": 2}})


def test_the_command_line_asks_a_suite():
    words = ["--suite", "ruler", "--length", "1024", "--task-set", "vt.hops=2"]
    config = configured([*words, "--chat", "never", "--export", "kvpress"])
    assert config.chat == "never"
    assert len(config.tasks) == 11 and config.lengths == (1024,)
    assert {e.title: dict(e.fields) for e in config.tasks}["vt"] == {"hops": 2}
    both = configured([*words, "--tasks", "recall"])
    assert len(both.tasks) == 12
    both = configured([*words, "--tasks", "chain", "--task-set", "chain.hops=3"])
    assert dict(both.tasks[0].fields) == {"hops": 3} and len(both.tasks) == 12


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "rulr"], "Unknown suite 'rulr'.*'ruler'"),
        (["--suite", "ruler", "--task-set", "hops=2"], "TASK.FIELD=VALUE"),
        (["--suite", "ruler", "--set", "tasks=[vt]"], "given twice"),
        (["--tasks", "vt", "--allow-code"], "allow_code"),
        (["--tasks", "vt", "--task-set", "*.name=a"], "has a field 'name'"),
        (["--suite", "ruler", "--task-set", "vt.name=a"], "no field 'name'"),
        (["--suite", "ruler", "--task-set", "vt.unit=a"], "no field 'unit'"),
    ],
)
def test_what_is_wrong_is_said(words, said):
    with pytest.raises(ValueError, match=said):
        configured(words)


def test_settings_of_methods_that_are_not_asked_say_nothing():
    """An evaluation's own, that is: what a user sets of them is a mistake."""
    whole = ["--config", "real_tolerance"]
    assert set(configured(whole).overrides) == {"kivi_2bit", "snapkv"}
    words = [*whole, "--compression", "kivi_2bit"]
    assert set(configured(words).overrides) == {"kivi_2bit"}
    made = configured([*words, "--set", "overrides.snapkv.evict.score.window=8"])
    with pytest.raises(ValueError, match="'snapkv', which is not evaluated"):
        methods(made)
