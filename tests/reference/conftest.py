"""Rows that the tests of the references draw."""

import numpy as np
import pytest

from tests.reference.rows import D, H, K, S


@pytest.fixture
def draw() -> np.random.Generator:
    """A seeded generator."""
    return np.random.default_rng(0)


@pytest.fixture
def row(draw):
    """`q` of all positions, `k`, `v` of all, with positions and query positions."""
    shapes = (H, S, D), (K, S, D), (K, S, D)
    q, k, v = (draw.normal(size=shape) for shape in shapes)
    return q, k, v, np.tile(np.arange(S), (K, 1)), np.arange(S)
