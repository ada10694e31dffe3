"""What `tools/results.py` makes of accuracies."""

import math

import pytest

from kvjax.eval.report import comparison
from kvjax.eval.report.comparison import Claim, Measured
from kvjax.eval.report.comparison.figures import series
from kvjax.eval.report.comparison.gap import gap_closed
from kvjax.eval.report.style import save_svg
from tests.tree import tool

pages = tool("results_pages")
tolerance = tool("results_tolerance")
real = tool("results_real")

SEEN = "query_aware"
BASE = {
    ("recall", SEEN, "none", None): 1.0,
    ("recall", SEEN, "knorm", 0.25): 0.2,
    ("recall", SEEN, "knorm", 0.125): 0.0,
    ("chain", SEEN, "none", None): 0.8,
    ("chain", SEEN, "knorm", 0.25): 0.4,
    ("fact", SEEN, "none", None): 1.0,
    ("fact", SEEN, "knorm", 0.25): 0.91,
}


QUARTER = Claim(title="a quarter", compressions=("knorm",), keep=0.25)


def test_share_is_the_mean_over_cells_with_a_gap():
    tuned = {**BASE, ("recall", SEEN, "knorm", 0.25): 0.6}  # half of its gap
    tuned["chain", SEEN, "knorm", 0.25] = 0.9  # 125 % of it
    tuned["fact", SEEN, "knorm", 0.25] = 0.0  # a gap of 9 points does not count
    got = gap_closed(BASE, tuned, QUARTER)
    assert got.cells == 2
    assert got.share == pytest.approx((0.5 + 1.25) / 2)
    assert (got.before, got.after, got.full) == pytest.approx((0.3, 0.75, 0.9))


def test_a_loss_counts_against_the_share():
    tuned = {**BASE, ("recall", SEEN, "knorm", 0.25): 0.0}
    assert gap_closed(BASE, tuned, QUARTER).share == pytest.approx(-0.125)


def test_no_gap_is_no_number():
    fact = {cell: score for cell, score in BASE.items() if cell[0] == "fact"}
    got = gap_closed(fact, fact, QUARTER)
    assert math.isnan(got.share)
    assert got.cells == 0


def test_what_a_model_loses_is_of_its_own():
    """Over the cells in which the base model loses, and which a model has."""
    better = {**BASE, ("recall", SEEN, "knorm", 0.25): 0.6}
    better["chain", SEEN, "none", None] = 1.0
    del better["fact", SEEN, "none", None]
    *_, one, two = comparison.costs_table([QUARTER], "a", {"a": BASE, "b": better})
    assert one == "| a quarter | a | 90.0 | 30.0 | 67 | 2 |"
    assert two == "| a quarter | b | 100.0 | 50.0 | 50 | 2 |"
    half = {cell: score for cell, score in better.items() if cell[0] == "recall"}
    *_, last = comparison.costs_table([QUARTER], "a", {"a": BASE, "c": half})
    assert last == "| a quarter | c | 100.0 | 60.0 | 40 | 1 |"


def test_claims_are_about_their_own_cells():
    claims = {claim.title: claim for claim in tolerance.CLAIMS}
    cells = [cell for cell in BASE if claims["eviction, keep 1/8"].about(cell)]
    assert cells == [("recall", SEEN, "knorm", 0.125)]
    left_out = claims["methods left out, keep 1/4"]
    assert not left_out.about(("recall", SEEN, "knorm", 0.25))


def test_conditions_say_where_evaluations_differ():
    one = {
        "config": {"items": 500, "lengths": [512]},
        "dtype": "float32",
        "jax": "1.2",
        "device": "cpu",
        "date": "2030-01-02T03:04",
    }
    other = {**one, "dtype": "bfloat16"}
    got = comparison.conditions([one, other, one])
    assert got["dtype"] == "float32 and bfloat16"
    assert got["date"] == "2030-01-02"
    assert got["items per cell"] == "500"


def test_one_bit_is_a_compression_of_its_own():
    def one(scores):
        return Measured(scores=scores, bytes={}, header={})

    cell, none = ("fact", SEEN, "kivi_2bit", None), ("fact", SEEN, "none", None)
    evaluations = {
        "tolerance-base": one({none: 1.0, cell: 0.6}),
        "one_bit-base": one({none: 0.9, cell: 0.2}),
    }
    (got,) = tolerance.scores(evaluations).values()
    renamed = ("fact", SEEN, tolerance.ONE_BIT, None)
    assert got == {none: 1.0, cell: 0.6, renamed: 0.2}


def test_a_page_names_what_is_there():
    cell = ("fact", SEEN, "dms", 0.25)
    one = Measured(scores={cell: 0.5}, bytes={cell: 2048.0}, header={})
    lines = comparison.score_tables(pages.PAGES["dms"].columns, {"dms-dms": one})
    assert "| fact | query_aware | 50.0 |  |  |" in lines
    assert "| KiB per prompt |  | 2 |  |  |" in lines
    titles = "full, trained"  # the last one; what was not measured is left out
    assert f"| task | visibility | dms, 0.25 | dms, 0.125 | {titles} |" in lines


def test_a_line_of_a_figure_is_a_method_over_its_budgets():
    lines = series(pages.PAGES["dms"].columns)
    assert [column.keep for column in lines["dms, immediate"]] == [0.25, 0.125]
    assert {column.evaluation for column in lines["h2o"]} == {"dms-base"}


def test_a_figure_draws_both_seeds(tmp_path):
    cell = ("fact", SEEN, "dms", 0.25)
    one = Measured(scores={cell: 0.5}, bytes={cell: 2048.0}, header={})
    evaluations = {"dms-dms": one, "dms-dms-seed1": one}
    figure = comparison.bytes_figure(pages.PAGES["dms"].columns, evaluations)
    save_svg(figure, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text.count("<!-- dms, seed 1 -->") == 1  # of the legend


def test_bound_of_streaming_llm():
    config = {"lengths": [256], "seed": 1, "items": 200, "keeps": [1.0, 0.5, 0.25]}
    tasks = [{"name": "recall", "fields": {"value_length": 4}}]
    got = comparison.recency_bounds({"config": {**config, "tasks": tasks}}, n_sink=4)
    assert got[1.0] == 1.0
    # Records lie anywhere in the context, and half of it stays but for the sinks.
    assert got[0.25] < got[0.5] < 0.6
    assert got[0.5] == pytest.approx(0.5, abs=0.1)


def test_the_page_of_a_real_model():
    """Gates stand beside SnapKV; texts are perplexities, and no cells of a gap."""
    header = {
        "config": {"items": 8, "lengths": [64]},
        **{"dtype": "float32", "jax": "1.2", "device": "cpu", "date": "2030-01-02"},
    }

    def one(method: str, score: float, loss: float) -> Measured:
        task, text = ("vt", "query_agnostic"), ("novel", "query_agnostic")
        scores = {
            (*task, "none", None): 0.8,
            (*task, method, 0.25): score,
            (*text, "none", None): 1.0,
            (*text, method, 0.25): 0.1,
        }
        losses = {(*text, "none", None): loss, (*text, method, 0.25): 2 * loss}
        return Measured(scores=scores, bytes={}, header=header, losses=losses)

    found = {
        "real_tolerance-smollm2": one("snapkv", 0.2, math.log(2.0)),
        "real_tolerance-smollm2-surrogate": one("surrogate", 0.5, math.log(2.0)),
    }
    assert {cell[0] for cell in real.scores(found)["smollm2"]} == {"vt"}
    lines = real.page(found)
    assert "| snapkv, keep 1/4 | 50 | 50 | 20.0, 50.0, 80.0 | 1 |" in lines
    assert "| novel | snapkv | 0.25 | 4.00 |  |" in lines
