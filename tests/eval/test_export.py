"""Runs in kvpress's layout."""

import csv
import dataclasses
import json

import pytest
import yaml

from kvjax.eval import harness
from kvjax.eval.export import check_export, export_kvpress
from kvjax.eval.plan import plan
from kvjax.eval.rows import read_rows
from kvjax.eval.tasks import RULER
from kvjax.eval.tasks.recall import Recall
from tests.eval import tiny


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    model, tokenizer = tiny.model(), tiny.tokenizer()
    config = tiny.config(keeps=[0.25], visibility=["query_agnostic", "query_aware"])
    path = tmp_path_factory.mktemp("runs") / "run"
    rows = harness.run(model, tokenizer, config, path)
    return plan(model.config, tokenizer, config), path, rows


def test_folders_hold_what_was_replied(finished, tmp_path):
    made, run, rows = finished
    folders = export_kvpress(made, run, tmp_path / "out")
    names = {one.name for one in folders}
    assert "kvjax__96__tiny__snapkv__0.75" in names
    assert "kvjax__96__tiny__none__0.00__query_aware" in names and len(names) == 6
    folder = tmp_path / "out" / "kvjax__96__tiny__snapkv__0.75"
    cell = "recall-96-query_agnostic-snapkv-keep0.25"
    with open(folder / "predictions.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    found = read_rows(run / "items" / f"{cell}.parquet")
    assert [row["predicted_answer"] for row in table] == [one["reply"] for one in found]
    assert [row["question"] for row in table] == [
        one.turns[0].question for one in made.groups[0].episodes
    ]
    (row,) = (row for row in rows if row["cell"] == cell)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == {"recall": {"score": pytest.approx(100 * row["score"])}}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["compression_ratio"] == 0.75 and config["press_name"] == "snapkv"
    assert config["kvjax"]["model_fingerprint"]


def test_a_folder_of_another_run_stays(finished, tmp_path):
    made, run, _ = finished
    folders = export_kvpress(made, run, tmp_path)
    assert export_kvpress(made, run, tmp_path) == folders  # its own
    config = yaml.safe_load((folders[0] / "config.yaml").read_text())
    config["kvjax"]["date"] = "yesterday"
    (folders[0] / "config.yaml").write_text(yaml.safe_dump(config))
    before = (folders[1] / "metrics.json").stat().st_mtime_ns
    with pytest.raises(ValueError, match="is of another run"):
        export_kvpress(made, run, tmp_path)
    assert (folders[1] / "metrics.json").stat().st_mtime_ns == before
    (folders[0] / "config.yaml").write_text("kvjax: [")
    with pytest.raises(ValueError, match="is of another run"):
        export_kvpress(made, run, tmp_path)
    (folders[0] / "config.yaml").unlink()
    with pytest.raises(ValueError, match="is of another run"):
        export_kvpress(made, run, tmp_path)


def test_ruler_is_called_so(finished, monkeypatch, tmp_path):
    made, run, _ = finished
    assert RULER["vt"].name == "vt"
    monkeypatch.setattr("kvjax.eval.export.RULER", {"recall": Recall})
    folder, *_ = export_kvpress(made, run, tmp_path)
    assert folder.name == "ruler__96__tiny__none__0.00"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics["recall"]) == ["string_match"]


def test_what_cannot_be_exported_is_refused_before_the_run(finished, tmp_path):
    made, run, _ = finished
    folders = export_kvpress(made, run, tmp_path)
    new = tmp_path / "run"
    check_export(made, new, tmp_path / "out")
    with pytest.raises(ValueError, match="is of another run"):
        check_export(made, new, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written to"):
        check_export(made, new, tmp_path / "file")
    config = dataclasses.replace(made.config, model="x" * 300)
    with pytest.raises(ValueError, match="more than 255 bytes"):
        check_export(dataclasses.replace(made, config=config), new, tmp_path / "out")
    assert set(check_export(made, run, tmp_path)) == {one.name for one in folders}


def test_budgets_with_the_same_two_digits_have_folders_of_their_own(tmp_path):
    model, tokenizer = tiny.model(), tiny.tokenizer()
    config = tiny.config(keeps=[0.25, 0.254, 0.5], visibility=["query_agnostic"])
    made = plan(model.config, tokenizer, config)
    folders = check_export(made, tmp_path / "run", tmp_path / "out")
    snapkv = [name for name in folders if "__snapkv__" in name]
    ends = [name.rpartition("__")[2] for name in snapkv]
    assert ends == ["0.75", "0.746", "0.50"]
    assert all(len(cells) == 1 for cells in folders.values())
