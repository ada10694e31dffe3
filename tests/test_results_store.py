"""The numbers that docs/results/ keeps."""

import dataclasses
import json

import pytest

from kvjax.eval.record import SCHEMA
from kvjax.eval.report.comparison import Measured, conditions, gather, write_numbers
from kvjax.eval.report.comparison.measured import CellKey
from kvjax.eval.report.comparison.store import read_numbers
from kvjax.eval.results import open_run
from tests.eval.synthetic import row
from tests.tree import ROOT, tool

results = tool("results")

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
    return Measured(scores=scores, bytes={NONE: 2048.0}, header=HEADER)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "page.json"
    write_numbers(path, {"a": one({CELL: 0.5, NONE: 1 / 3}), "b": one({NONE: 1.0})})
    got = read_numbers(path)
    assert got["a"].scores == {CELL: 0.5, NONE: 1 / 3}
    assert got["a"].bytes == {CELL: None, NONE: 2048.0}
    assert list(got) == ["a", "b"]
    assert conditions([got["b"].header])["items per cell"] == "500"


def test_losses_of_texts_are_kept(tmp_path):
    path = tmp_path / "page.json"
    measured = dataclasses.replace(one({CELL: 0.5, NONE: 1.0}), losses={NONE: 2.25})
    write_numbers(path, {"a": measured})
    assert read_numbers(path)["a"].losses == {NONE: 2.25}


def test_no_path_of_a_machine_is_kept(tmp_path):
    path = tmp_path / "page.json"
    tasks = [{"name": "text", "fields": {"path": "/somebody/texts/novel.txt"}}]
    header = {**HEADER, "config": {**HEADER["config"], "tasks": tasks}}
    write_numbers(path, {"a": dataclasses.replace(one({CELL: 0.5}), header=header)})
    assert "somebody" not in path.read_text() and "novel.txt" in path.read_text()


def test_a_page_that_is_not_there_has_no_numbers(tmp_path):
    assert read_numbers(tmp_path / "page.json") == {}


@pytest.mark.parametrize("damage", ["", '{"a": {"cells": []}}', '{"a": 3}'])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "page.json"
    path.write_text(damage)
    with pytest.raises(ValueError, match=r"page\.json does not hold evaluations"):
        read_numbers(path)


PAGES = sorted((ROOT / "docs" / "results").glob("*.json"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_committed_pages_say_what_their_numbers_say(path):
    found = read_numbers(path)
    assert path.with_suffix(".md").read_text() == results.page_text(path.stem, found)


CONFIG = {
    "tasks": [
        {"name": "recall", "label": "", "visibility": []},
        {"name": "chain", "label": "sums", "visibility": ["query_aware"]},
        {"name": "text", "label": "novel", "visibility": []},
    ],
    "visibility": ["query_aware", "query_agnostic"],
}
WHOLE: dict[CellKey, float] = {
    (task, arm, compression, keep): 0.5
    for task, arm in (
        ("recall", "query_aware"),
        ("recall", "query_agnostic"),
        ("sums", "query_aware"),
        ("novel", "query_agnostic"),
    )
    for compression, keep in (("none", None), ("knorm", 0.25))
}


def test_an_evaluation_is_whole_with_its_last_cell():
    def whole(scores) -> bool:
        header = {**HEADER, "config": CONFIG}
        return Measured(scores=scores, bytes={}, header=header).whole

    assert whole(WHOLE)
    for cell in WHOLE:
        assert not whole({c: x for c, x in WHOLE.items() if c != cell}), cell
    assert not whole({c: x for c, x in WHOLE.items() if c[0] == "recall"})
    assert not whole({})


@pytest.mark.parametrize("before", [{}, {"duo-duo": one({CELL: 0.5, NONE: 1.0})}])
def test_an_unfinished_evaluation_changes_no_page(tmp_path, before):
    write_numbers(tmp_path / "duo.json", before)
    directory = tmp_path / "evals" / "duo-duo"
    directory.mkdir(parents=True)
    header = {**HEADER, "schema": SCHEMA, "config": CONFIG}
    (directory / "run.json").write_text(json.dumps(header))
    path = tmp_path / "duo.json"
    got, unfinished = gather(path, ["duo-duo"], tmp_path / "evals")
    assert {k: x.scores for k, x in got.items()} == {
        k: x.scores for k, x in before.items()
    }
    assert unfinished == [directory]


def test_a_finished_evaluation_is_taken_over(tmp_path):
    path, evals = tmp_path / "duo.json", tmp_path / "evals"
    write_numbers(path, {"duo": one({CELL: 0.5}), "other": one({NONE: 1.0})})
    run = open_run(evals / "duo", {**HEADER, "schema": SCHEMA, "config": CONFIG})
    for number, cell in enumerate(WHOLE):
        task, arm, compression, keep = cell
        values = row(task, 512, compression, keep, visibility=arm)
        run.write(str(number), values, [], None)
    got, unfinished = gather(path, ["other", "duo"], evals)
    assert list(got) == ["other", "duo"] and not unfinished
    assert got["other"].scores == {NONE: 1.0}
    assert set(got["duo"].scores) == set(got["duo"].bytes) == set(WHOLE)
