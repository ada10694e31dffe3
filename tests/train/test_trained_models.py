"""The committed models that were trained for a small cache."""

import pathlib
from collections.abc import Sequence

import pytest

from kvjax.eval import harness
from kvjax.eval.config import decode_config
from kvjax.models.bundled import bundled_models, model_directory
from kvjax.models.io import load

DMS, TOLERANT = "kvjax-tiny-dms", "kvjax-tiny-tolerant"


def scores(
    name: str, compressions: Sequence[str], keep: float, directory: pathlib.Path
) -> dict[tuple[str, str], float]:
    """Scores of a bundled model by task and compression."""
    model, tokenizer = load(model_directory(name), dtype="float32")
    config = decode_config(
        {
            "model": name,
            "compressions": list(compressions),
            "keeps": [keep],
            "tasks": [
                {"name": "recall", "fields": {"value_length": 4}},
                {"name": "chain", "fields": {"steps": 2}},
            ],
            "lengths": [512],
            "items": 16,
            "batch": 16,
            "window": 16,
        }
    )
    rows = harness.run(model, tokenizer, config, directory)
    return {(row["task"], row["compression"]): row["score"] for row in rows}


@pytest.mark.parametrize("name", [DMS, TOLERANT])
def test_is_bundled_and_small(name):
    assert name in bundled_models()
    files = pathlib.Path(model_directory(name)).iterdir()
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20


@pytest.mark.slow
def test_dms_needs_a_quarter_of_the_cache(tmp_path):
    found = scores(DMS, ["dms", "h2o"], 0.25, tmp_path)
    for task in ("recall", "chain"):
        assert found[task, "dms"] >= 0.9
        assert found[task, "h2o"] <= found[task, "dms"] - 0.15


@pytest.mark.slow
def test_tolerant_needs_an_eighth_of_the_cache(tmp_path):
    """Where the model that it was trained from is lost."""
    before = scores("kvjax-tiny", ["tova", "h2o"], 0.125, tmp_path / "before")
    after = scores(TOLERANT, ["tova", "h2o"], 0.125, tmp_path / "after")
    for task in ("recall", "chain"):
        assert after[task, "none"] >= 0.9
        for method in ("tova", "h2o"):
            assert after[task, method] >= before[task, method] + 0.5
