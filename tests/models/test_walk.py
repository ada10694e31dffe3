"""A loop over layers computes what the layers one by one do, under every preset."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.models import walk
from kvjax.models.simulate import simulated
from tests.small import LATER, LENGTHS, PRESETS, preset, small_model

LAYERS = 3


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


def total_of(name: str, *, loop: bool, remat: bool = False):
    """A number that depends on every state behind the layers, and the weights."""
    graph, params = nnx.split(small_model(layers=LAYERS))
    total = jnp.asarray(LENGTHS + LATER)
    width = int(total.max())
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 60, (len(LENGTHS), width)), jnp.int32)
    index = jnp.broadcast_to(jnp.arange(width), tokens.shape)
    positions = jnp.where(index < total[:, None], index, -1)
    points = jnp.asarray(LENGTHS, jnp.int32)
    mix = jnp.asarray(rng.normal(size=64), jnp.float32)

    def loss(params):
        attention = simulated(points, preset(name))
        model = nnx.merge(graph, params)
        hidden = model(tokens, positions, attention, loop=loop, remat=remat)
        return jnp.sum(jnp.where(positions >= 0, hidden @ mix, 0) ** 2)

    return loss, params


@pytest.mark.sweep(1, 4)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset(name):
    plain, params = total_of(name, loop=False)
    looped, _ = total_of(name, loop=True)
    np.testing.assert_allclose(
        jax.jit(looped)(params), jax.jit(plain)(params), rtol=1e-5
    )


@pytest.mark.parametrize("name", ["none", "snapkv_kivi"])
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.slow
def test_gradient(name, remat):
    plain, params = total_of(name, loop=False)
    looped, _ = total_of(name, loop=True, remat=remat)
    slopes = [jax.tree.leaves(jax.jit(jax.grad(f))(params)) for f in (plain, looped)]
    scale = max(float(jnp.abs(leaf).max()) for leaf in slopes[0])
    for one, other in zip(*slopes, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", [3]),
        ("snapkv", [2]),  # the first layer is handed no priorities
        ("random", []),  # a seed per layer
        ("pyramidkv", []),  # slots per layer
        ("duo", []),  # heads differ
        ("quest", [2]),  # a dense layer first
    ],
)
def test_which_layers_are_alike(name, expected, loops):
    looped, params = total_of(name, loop=True)
    jax.eval_shape(looped, params)
    assert loops == expected


def test_what_attention_closes_over_has_its_gradient(loops):
    from kvjax.attention import causal_attention

    graph, params = nnx.split(small_model(layers=LAYERS))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 60, (2, 24)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(24), tokens.shape)

    def loss(gain, loop):
        model = nnx.merge(graph, params)
        hidden = model(
            tokens, positions, lambda i: gain * causal_attention(i), loop=loop
        )
        return jnp.sum(hidden[..., 0])

    slope, again = (jax.grad(loss)(0.7, loop) for loop in (False, True))
    assert loops == [LAYERS] and abs(float(slope)) > 1e-2
    np.testing.assert_allclose(again, slope, rtol=1e-4)
