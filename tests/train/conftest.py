"""Fixtures of the tests of training."""

import pytest

from kvjax.train.run import run
from tests.train.datasets_samples import TEXTS, write_jsonl
from tests.train.tiny_run import recipe
from tests.train.whole_run import Whole


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Whole:
    """An uninterrupted run of the plain recipe: its last state and its directory."""
    directory = tmp_path_factory.mktemp("whole")
    return run(recipe(), directory), directory


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch) -> None:
    """`datasets` keeps what it prepares in the test's own directory."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def texts(tmp_path) -> str:
    """A file of documents, one per line."""
    return write_jsonl(tmp_path / "texts.jsonl", [{"text": t} for t in TEXTS])
