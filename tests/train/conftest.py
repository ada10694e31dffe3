"""Fixtures of the tests of training."""

import gc

import pytest


@pytest.fixture
def collected():
    """What a test leaves behind is collected, and said, before the next one runs."""
    yield
    gc.collect()
