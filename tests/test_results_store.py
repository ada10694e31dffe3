"""The numbers that docs/results/ keeps."""

import json

import pytest

from kvjax.eval.record import SCHEMA
from tests.tree import ROOT, tool

pages = tool("results_pages")
results = tool("results")
store = tool("results_store")

CELL = ("recall", "query_aware", "knorm", 0.25)
NONE = ("recall", "query_aware", "none", None)
HEADER = {
    "date": "2030-01-02T03:04",
    "device": "cpu",
    "dtype": "float32",
    "jax": "1.2",
    "model": "somebody/runs/model",
    "config": {"items": 500, "lengths": [512], "seed": 1, "model": "somebody"},
}


def one(scores):
    return pages.Found(scores=scores, bytes={NONE: 2048.0}, header=HEADER)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "page.json"
    store.write(path, {"a": one({CELL: 0.5, NONE: 1 / 3}), "b": one({NONE: 1.0})})
    got = store.read(path)
    assert got["a"].scores == {CELL: 0.5, NONE: 1 / 3}
    assert got["a"].bytes == {CELL: None, NONE: 2048.0}
    assert list(got) == ["a", "b"]
    assert pages.conditions([got["b"].header])["items per cell"] == "500"


def test_no_path_of_a_machine_is_kept(tmp_path):
    path = tmp_path / "page.json"
    store.write(path, {"a": one({CELL: 0.5})})
    assert "somebody" not in path.read_text()


def test_a_page_that_is_not_there_has_no_numbers(tmp_path):
    assert store.read(tmp_path / "page.json") == {}


@pytest.mark.parametrize("damage", ["", '{"a": {"cells": []}}', '{"a": 3}'])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "page.json"
    path.write_text(damage)
    with pytest.raises(ValueError, match=r"page\.json does not hold evaluations"):
        store.read(path)


PAGES = sorted((ROOT / "docs" / "results").glob("*.json"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_committed_pages_say_what_their_numbers_say(path):
    found = store.read(path)
    assert path.with_suffix(".md").read_text() == results.page_text(path.stem, found)


CONFIG = {
    "tasks": [
        {"name": "recall", "label": "", "visibility": []},
        {"name": "chain", "label": "sums", "visibility": ["query_aware"]},
    ],
    "visibility": ["query_aware", "query_agnostic"],
}
WHOLE = {
    (task, arm, *column): 0.5
    for task, arm in (
        ("recall", "query_aware"),
        ("recall", "query_agnostic"),
        ("sums", "query_aware"),
    )
    for column in (("none", None), ("knorm", 0.25))
}


def test_an_evaluation_is_whole_with_its_last_cell():
    def whole(scores) -> bool:
        header = {**HEADER, "config": CONFIG}
        return results.is_whole(pages.Found(scores=scores, bytes={}, header=header))

    assert whole(WHOLE)
    for cell in WHOLE:
        assert not whole({c: x for c, x in WHOLE.items() if c != cell}), cell
    assert not whole({c: x for c, x in WHOLE.items() if c[0] == "recall"})
    assert not whole({})


@pytest.mark.parametrize("before", [{}, {"duo-duo": one({CELL: 0.5, NONE: 1.0})}])
def test_an_unfinished_evaluation_changes_no_page(
    tmp_path, monkeypatch, capsys, before
):
    monkeypatch.setattr(results, "OUT", tmp_path)
    store.write(tmp_path / "duo.json", before)
    directory = tmp_path / "evals" / "duo-duo"
    directory.mkdir(parents=True)
    header = {**HEADER, "schema": SCHEMA, "config": CONFIG}
    (directory / "run.json").write_text(json.dumps(header))
    got = results.found("duo", tmp_path)
    assert {k: x.scores for k, x in got.items()} == {
        k: x.scores for k, x in before.items()
    }
    assert "not finished" in capsys.readouterr().out
