"""Small checkpoints to damage."""

import pathlib
import shutil

import pytest

from kvjax.models import save
from kvjax.models import weights as weights_module
from tests.models.samples import sample


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> pathlib.Path:
    """A small Llama in one file, and one in shards."""
    folder = tmp_path_factory.mktemp("saved")
    save(sample("llama"), folder / "one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_module, "SHARD_BYTES", 20_000)
        save(sample("llama"), folder / "many")
    return folder


@pytest.fixture
def one(saved, tmp_path) -> pathlib.Path:
    return shutil.copytree(saved / "one", tmp_path / "one")


@pytest.fixture
def many(saved, tmp_path) -> pathlib.Path:
    return shutil.copytree(saved / "many", tmp_path / "many")
