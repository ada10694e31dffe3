"""What the harness writes of the first item, token by token."""

import json

import numpy as np
import pytest

import kvjax
from kvjax.eval import fidelity, harness
from kvjax.eval.maps import MapMaker
from kvjax.eval.report import write_report
from kvjax.eval.report.run import load_run
from tests.eval import tiny

pytestmark = pytest.mark.slow  # a run with two methods that compile much


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of a question and of a text, with a method for each kind of map."""
    path = tmp_path_factory.mktemp("run")
    (path / "text.txt").write_text("It was the best of times, it was the worst. " * 9)
    text = {"path": str(path / "text.txt"), "context": 48, "continuation": 12}
    config = tiny.config(
        compressions=["h2o_decode", "oracle"],
        keeps=[0.5],
        tasks=[
            {"name": "recall", "fields": {"value_length": 1}},
            {"name": "text", "fields": text},
        ],
        items=2,
        batch=1,
        overrides={"oracle": {"evict.score.chunk": 64}},
    )
    model = tiny.model()
    harness.run(model, tiny.tokenizer(), config, path / "run")
    return model, path / "run"


def map_of(run, task, method):
    (file,) = (run[1] / "maps").glob(f"{task}-*-{method}*.json")
    return json.loads(file.read_text())


def test_every_map_can_be_read_and_drawn(run):
    loaded = load_run(run[1])
    assert len(loaded.maps) == 2 * 4
    page = write_report(run[1]).read_text()
    assert page.count('class="empty"') == 1  # no needle
    names = {file.stem.split("_")[0] for file in (run[1] / "report").glob("*.png")}
    assert {"tokens", "difference", "departures", "kl", "worth"} <= names


def test_text_has_numbers_of_each_token(run):
    """They are those of `fidelity`, whose means the rows hold."""
    model, path = run
    entry = map_of(run, "text", "h2o_decode")
    tokens = tiny.tokenizer().encode("It was the best of times, it was the worst. " * 2)
    c = kvjax.compression("h2o_decode", **{"evict.score.recent": 4}).with_keep(0.5)
    told = fidelity.told(model, np.array([tokens[:60]]), 48, c)
    found = entry["following"]
    assert "".join(found["tokens"]) == tiny.tokenizer().decode(tokens[48:60])
    for name in ("nll", "nll_full", "kl", "agrees"):
        np.testing.assert_allclose(found[name], told[name][0], rtol=2e-3, atol=1e-6)
    assert "following" not in map_of(run, "recall", "h2o_decode")


def test_departures_go_on_from_what_was_kept(run):
    for task in ("recall", "text"):
        entry = map_of(run, task, "h2o_decode")
        found, count = entry["departures"], len(entry["tokens"])
        assert found["times"][0] == 0 and found["times"][-1] == len(found["tokens"])
        for kept, left in zip(entry["kept"], found["left"], strict=True):
            for head, own in zip(kept, left, strict=True):
                assert [n for n, time in enumerate(own[:count]) if time != 0] == head
        assert any(time for layer in found["left"] for own in layer for time in own)
        assert "departures" not in map_of(run, task, "oracle")
    # A question is read at once, and then the reply.
    found = map_of(run, "recall", "h2o_decode")
    asked = len(found["question"])
    assert found["departures"]["times"][1] == asked
    assert "".join(found["departures"]["tokens"]).startswith(found["question"])


def test_worth_is_minus_the_slope(run):
    model, _ = run
    entry = map_of(run, "text", "oracle")
    tokens = tiny.tokenizer().encode("It was the best of times, it was the worst. " * 2)
    rows = np.array([tokens[:60]])
    slopes = np.asarray(kvjax.gate_slopes(model, rows, None, np.array([48])))
    worth = np.array(entry["worth"])
    np.testing.assert_allclose(worth, -slopes[:, 0, :, :48], rtol=2e-3, atol=1e-6)
    answered = np.array(map_of(run, "recall", "oracle")["worth"])
    assert answered.shape[-1] == len(map_of(run, "recall", "oracle")["tokens"])
    assert np.abs(answered).max() > 0
    assert "worth" not in map_of(run, "text", "h2o_decode")


def test_only_the_middle_budget_is_watched():
    assert MapMaker(tiny.model(), [0.125, 0.5, 0.25]).watched == {None, 0.25}
