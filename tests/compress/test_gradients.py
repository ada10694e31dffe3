"""The parallel form of every preset has the gradient that its logits have."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kvjax
from kvjax.models import Decoder
from tests.small import LATER, LENGTHS, MANY, PRESETS, ROWS, preset, small_model


def loss_of(name: str):
    """Mean log-probability of the tokens behind the compression point."""
    config = dataclasses.replace(small_model().config, vocab_size=MANY)
    graph, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    rng, total = np.random.default_rng(0), LENGTHS + LATER
    whole = np.stack([rng.permutation(MANY)[: total.max()] for _ in range(ROWS)])
    whole = whole.astype(np.int32)
    index = np.arange(whole.shape[1] - 1)
    answer = (index + 1 >= LENGTHS[:, None]) & (index + 1 < total[:, None])

    def loss(params):
        model = nnx.merge(graph, params)
        logits = kvjax.simulate(model, whole, total, LENGTHS, preset(name))
        logs = jax.nn.log_softmax(logits[:, :-1])
        picked = jnp.take_along_axis(logs, whole[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(answer, picked, 0)) / float(answer.sum())

    return loss, params


@pytest.mark.sweep(1, 2)
@pytest.mark.parametrize("name", PRESETS)
def test_gradient(name):
    loss, params = loss_of(name)
    run = jax.jit(jax.value_and_grad(loss))
    _, grads = run(params)
    leaves = jax.tree.leaves(grads)
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    norm = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in leaves))
    assert norm > 1e-3
    if preset(name).store != kvjax.Storage():
        return  # a codec passes its gradient straight through: not the slope
    # Along the gradient the loss rises by its norm, but for jumps where the choice of
    # tokens changes: those are rare, so the median of short pieces has none.
    step = 2e-4

    def at(place: int):
        far = place * step / norm
        return float(run(jax.tree.map(lambda p, g: p + far * g, params, grads))[0])

    slopes = np.diff([at(place) for place in range(-3, 4)]) / step
    np.testing.assert_allclose(np.median(slopes), norm, rtol=0.03)
