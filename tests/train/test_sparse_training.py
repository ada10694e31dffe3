"""Training under sparse prefill: the op's own gradient, from a recipe."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

import kvjax
from kvjax.pallas_kernels.sparse_prefill import gradient
from kvjax.train.objectives.objective import make_objective
from kvjax.train.recipe import CachedConfig, CompressionChoice, SamplingConfig
from kvjax.train.run import run
from tests.train.small import SHAPE, a_batch, model_of, recipe

SHALLOW = dataclasses.replace(SHAPE, num_layers=1)

FIELDS = {
    "prefill.vertical": 6,
    "prefill.slash": 3,
    "prefill.last_q": 8,
    "prefill.first": 2,
    "prefill.local": 2,
    "prefill.block": 16,
    "prefill.dense_below": 0,
}


@pytest.fixture
def backward(monkeypatch) -> list[int]:
    """One entry per trace of the op's backward pass."""
    calls, terms = [], gradient.row_terms

    def noted(part, cotangent):
        calls.append(part.out.shape[2])
        return terms(part, cotangent)

    monkeypatch.setattr(gradient, "row_terms", noted)
    return calls


@pytest.mark.slow
def test_a_recipe_with_sparse_prefill_among_its_choices(tmp_path, backward):
    choices = (
        CompressionChoice(compression="vertical_slash", fields=FIELDS),
        CompressionChoice(compression="none", weight=1e-9),
    )
    config = recipe(
        sampling=SamplingConfig(choices=choices),
        cached=CachedConfig(items=0),
        remat=True,
        log_every=1,
        eval_items=1,
    )
    run(dataclasses.replace(config, model=SHALLOW), tmp_path)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    steps = [event for event in events if "width" in event]
    assert [event["compression"] for event in steps] == ["vertical_slash"] * 3
    assert all(np.isfinite(event["norm"]) and event["norm"] > 0 for event in steps)
    assert backward and set(backward) == {96}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputed_layers_change_nothing(dtype, backward):
    c = kvjax.compression("vertical_slash", **FIELDS)
    batch, (graph, state) = a_batch(), nnx.split(model_of(SHALLOW))
    state = jax.tree.map(lambda x: x.astype(dtype), state)

    def value_and_slope(remat):
        objective = make_objective(recipe(remat=remat), c)

        def loss(state):
            return objective(nnx.merge(graph, state), batch, None)[0]

        return jax.jit(jax.value_and_grad(loss))(state)

    (plain, one), (again, other) = value_and_slope(False), value_and_slope(True)
    assert len(backward) == 2
    small = 1e-5 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(plain, again, rtol=small)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=small)
    dense, _ = make_objective(recipe())(nnx.merge(graph, state), batch, None)
    assert abs(float(dense - plain)) > 1e-4  # the pattern leaves something out
