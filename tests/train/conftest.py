"""Fixtures of the tests of training."""

import pytest

from kvjax.train.run import run
from tests.train.tiny_run import recipe
from tests.train.whole_run import Whole


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Whole:
    """An uninterrupted run of the plain recipe: its last state and its directory."""
    directory = tmp_path_factory.mktemp("whole")
    return run(recipe(), directory), directory
