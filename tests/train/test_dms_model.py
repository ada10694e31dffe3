"""The committed model that says which tokens it can do without."""

import pytest

from kvjax.eval import harness
from kvjax.eval.config import decode_config
from kvjax.models.bundled import bundled_models
from kvjax.models.io import load

NAME = "kvjax-tiny-dms"


@pytest.mark.slow
def test_a_quarter_of_the_cache_is_enough(repo, tmp_path):
    assert NAME in bundled_models()
    directory = repo / "configs" / "model" / NAME
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 8 * 2**20
    model, tokenizer = load(directory, dtype="float32")
    tasks = [
        {"name": "recall", "fields": {"value_length": 4}},
        {"name": "chain", "fields": {"steps": 2}},
    ]
    config = decode_config(
        {
            "model": NAME,
            "compressions": ["dms", "h2o"],
            "keeps": [0.25],
            "tasks": tasks,
            "lengths": [512],
            "items": 16,
            "batch": 16,
            "window": 16,
        }
    )
    rows = harness.run(model, tokenizer, config, tmp_path)
    score = {(row["task"], row["compression"]): row["score"] for row in rows}
    for task in ("recall", "chain"):
        assert score[task, "dms"] >= 0.9
        assert score[task, "h2o"] <= score[task, "dms"] - 0.15
