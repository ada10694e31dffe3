"""Runs in kvpress's layout."""

import csv
import json

import pytest
import yaml

from kvjax.eval import harness
from kvjax.eval.export import export_kvpress
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
