"""Projections of keys and values: where they start, how they train, what is saved."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.attention import causal_attention
from kvjax.models.config import Projection
from kvjax.models.io import load, save
from kvjax.models.projection import with_projection
from kvjax.train.data import Mixture
from kvjax.train.data.sampling import Sampler
from kvjax.train.objectives.objective import make_objective
from kvjax.train.recipe import (
    CachedConfig,
    CompressionChoice,
    ObjectiveConfig,
    OptimizerConfig,
    SamplingConfig,
)
from kvjax.train.run import run
from kvjax.train.run.model import weights_of
from kvjax.train.run.params import params_of
from tests.train.small import DATA, STAGES, a_batch, model_of, recipe

BASES = [f"layers.attention.{side}_basis" for side in ("key", "value")]


def test_a_projection_starts_from_principal_components():
    tokens = a_batch().tokens
    lengths = np.array([96, 40, 77])
    model = with_projection(model_of(), Projection(), tokens, lengths)
    seen = []

    def look(inputs):
        seen.append(inputs)
        return causal_attention(inputs)

    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = model(tokens, positions, look, unroll=True)
    assert [inputs.depth.layer for inputs in seen] == [0, 1]
    np.testing.assert_array_equal(
        hidden, model_of()(tokens, positions, causal_attention, unroll=True)
    )
    rows = [np.arange(tokens.shape[1]) < n for n in lengths]
    for inputs in seen:
        plain = inputs.spec.rope.unrotate(inputs.k, positions[:, None])
        for x, basis in ((plain, inputs.key_basis), (inputs.v, inputs.value_basis)):
            for head in range(2):
                held = np.concatenate(
                    [np.asarray(x)[b, head, row] for b, row in enumerate(rows)]
                )
                _, sizes, _ = np.linalg.svd(held, full_matrices=False)
                along = np.linalg.norm(held @ np.asarray(basis)[head].T, axis=0)
                np.testing.assert_allclose(along, sizes, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sides", [{}, {"values": False}])
def test_a_projection_is_saved_with_the_model(sides, tmp_path):
    projection = Projection(**sides)
    model = with_projection(model_of(), projection, a_batch().tokens)
    save(model, tmp_path)
    again, _ = load(tmp_path, "float32", tokenizer=False)
    assert again.config == model.config
    want, found = params_of(model), params_of(again)
    assert want.keys() == found.keys()
    for name, x in want.items():
        np.testing.assert_array_equal(x, found[name])
    assert with_projection(again, projection) is again
    with pytest.raises(ValueError, match="Start from a model without one"):
        with_projection(again, Projection(keys=False))
    save(model_of(), tmp_path / "old")
    old, _ = load(tmp_path / "old", "float32", tokenizer=False)
    assert old.config.projection is None
    with pytest.raises(ValueError, match="got neither"):
        Projection(keys=False, values=False)


@pytest.mark.slow
def test_projections_learn_and_the_rest_stays(tmp_path):
    choice = CompressionChoice(compression="matryoshka", keeps=(0.5, 0.25))
    config = recipe(
        projection=Projection(),
        sampling=SamplingConfig(choices=(choice,)),
        objective=ObjectiveConfig(next_token=0.0, distill=1.0),
        optimizer=OptimizerConfig(name="adamw", learning_rate=0.02, warmup=1, decay=1),
        cached=CachedConfig(items=0),
    )
    weights, params = weights_of(config)
    assert sorted(params) == BASES
    with pytest.raises(ValueError, match="got no `sampling.choices`"):
        recipe(projection=Projection())
    more = dataclasses.replace(config, trainable=("norm.weight",))
    assert sorted(weights_of(more)[1]) == [*BASES, "norm.weight"]
    weights, params = weights_of(config, a_batch())
    stage = dataclasses.replace(STAGES[0], steps=100)
    state = run(dataclasses.replace(config, stages=(stage,)), tmp_path)
    unseen = Mixture(DATA, STAGES, seed=1).batch(0)

    @functools.partial(jax.jit, static_argnames="c")
    def miss(params, c):
        model = weights.joined(params, weights.fixed)
        return make_objective(config, c)(model, unseen, model_of())[0]

    for sample in Sampler(config.sampling, config.seed).samples[0]:
        start, end = (miss(p, sample.compression) for p in (params, state.params))
        assert end < 0.9 * start, sample.name
    model, _ = load(tmp_path / "model", "float32", tokenizer=False)
    after = params_of(model)
    for name, before in params_of(model_of()).items():
        stored = before.astype("bfloat16").astype("float32")
        np.testing.assert_array_equal(after[name], stored)
    c = kvjax.compression("matryoshka")
    _, cache = kvjax.prefill(model, np.asarray(a_batch().tokens), c=c)
    assert cache.nbytes > 0
