"""A loop over layers computes what the layers one by one do, under every preset."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.models import walk
from kvjax.models.simulate import simulated
from tests.small import LATER, LENGTHS, PRESETS, preset, small_model

LAYERS = 4


@pytest.fixture
def loops(monkeypatch) -> list[int]:
    """How many layers each loop that was made goes over."""
    found: list[int] = []
    plain = walk._loop

    def noted(program, layers, remat):
        found.append(len(layers))
        return plain(program, layers, remat)

    monkeypatch.setattr(walk, "_loop", noted)
    return found


def value_and_slope(name: str, *, loop: bool, remat: bool):
    graph, params = nnx.split(small_model(layers=LAYERS))
    total = jnp.asarray(LENGTHS + LATER)
    width = int(total.max())
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 60, (len(LENGTHS), width)), jnp.int32)
    index = jnp.broadcast_to(jnp.arange(width), tokens.shape)
    positions = jnp.where(index < total[:, None], index, -1)
    points = jnp.asarray(LENGTHS, jnp.int32)

    def loss(params):
        attention = simulated(points, preset(name))
        model = nnx.merge(graph, params)
        hidden = model(tokens, positions, attention, loop=loop, remat=remat)
        return jnp.sum(jnp.where(positions[..., None] >= 0, hidden, 0) ** 2)

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset(name):
    (value, slope), (looped, again) = (
        value_and_slope(name, loop=loop, remat=loop) for loop in (False, True)
    )
    np.testing.assert_allclose(looped, value, rtol=1e-5)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(slope))
    for one, other in zip(jax.tree.leaves(slope), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", [4]),
        ("snapkv", [3]),  # the first layer is handed no priorities
        ("random", []),  # a seed per layer
        ("pyramidkv", []),  # slots per layer
        ("duo", []),  # heads differ
        ("quest", [3]),  # a dense layer first
    ],
)
def test_which_layers_are_alike(name, expected, loops):
    value_and_slope(name, loop=True, remat=False)
    assert loops == expected
