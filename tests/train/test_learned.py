"""Learned evictors: DMS and the surrogate score."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kvjax
from kvjax.attention import causal_attention
from kvjax.depth import in_order
from kvjax.models import Decoder
from kvjax.models.config import Evictor
from kvjax.models.decoder import Attending
from kvjax.models.evictor import with_evictor
from kvjax.models.io import load, save
from kvjax.prefills import Delayed
from kvjax.train.objectives.dms import relaxed, shortfall
from kvjax.train.objectives.objective import make_objective
from kvjax.train.objectives.surrogate import oracle
from kvjax.train.recipe import (
    DMSConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SurrogateConfig,
    load_config,
)
from kvjax.train.run import run
from kvjax.train.run.params import params_of
from tests.train.small import SHAPE, STAGES, a_batch, model_of, predictions, recipe


def test_an_evictor_starts_by_keeping_everything(tmp_path):
    base = model_of()
    model = with_evictor(base, Evictor(kind="neuron", offset=3.0))

    def look(inputs, state):
        return causal_attention(inputs), state, inputs.retention

    tokens = a_batch().tokens
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    seen = model.run(tokens, positions, Attending(step=look))
    wanted = np.full((SHAPE.num_layers, 3, 2, 96), 3.0)
    np.testing.assert_array_equal(in_order(seen.loops, seen.left), wanted)
    save(model, tmp_path)
    again, _ = load(tmp_path, "float32", tokenizer=False)
    assert again.config == model.config
    np.testing.assert_array_equal(
        again(tokens, positions, causal_attention), seen.hidden
    )
    with pytest.raises(ValueError, match="kind 'neuron'; got 'mlp'"):
        with_evictor(model, Evictor(kind="mlp"))
    with pytest.raises(ValueError, match="Did you mean 'neuron'"):
        Evictor(kind="neurone")


def test_a_compression_that_asks_the_model_needs_one_that_answers():
    with pytest.raises(ValueError, match="it has no evictor"):
        kvjax.prefill(
            model_of(), np.ones((1, 64), np.int32), c=kvjax.compression("dms")
        )


def retained(seed: int, sure: float) -> Decoder:
    """A model whose neurons decide, and are sure of it."""
    model = with_evictor(model_of(), Evictor(gain=sure, offset=0.0), seed=seed)
    noise = np.random.default_rng(seed)
    kernel = model.layers.attention.q.kernel
    kernel[...] = jnp.asarray(noise.normal(size=kernel.shape) * 0.2, jnp.float32)
    return model


@pytest.mark.parametrize("window", [1, 8])
def test_relaxed_evictions_become_the_delayed_ones(window):
    """With decisions beyond doubt the relaxed pass is the masked one."""
    model, batch = retained(0, 1e5), a_batch()
    soft = relaxed(DMSConfig(window=window), batch.prompt_lengths, jnp.int32(0))
    found = predictions(model, batch, soft)
    hard = Delayed(window=window)
    want = predictions(model, batch, lambda x: hard.attend(x, x.positions, False)[0])
    np.testing.assert_allclose(found, want, atol=2e-4)
    full = predictions(model, batch)
    assert float(jnp.abs(full - want).max()) > 1e-2
    assert 0.0 <= float(soft.state) < 1.0


def test_immediate_eviction_is_one_setting_of_the_recipe():
    config = load_config("dms", ["dms.window=1"])
    assert config.dms is not None and config.dms.window == 1
    with pytest.raises(ValueError, match="`dms.window` must be an integer"):
        load_config("dms", ["dms.window=0"])


def test_shortfall_counts_what_a_row_may_keep():
    config = DMSConfig(window=4, ratio=4.0, ramp=10)
    lengths = jnp.array([40, 16])
    nothing = jnp.full((2, 3, 40), -1e9)
    # Row 0 may keep 10 tokens, 4 of them in the window: 30 of 36 go. Row 1: all 12.
    want = (30 / 36 + 1.0) / 2
    got = shortfall(nothing, config, lengths, jnp.int32(99))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert shortfall(-nothing, config, lengths, jnp.int32(99)) == 0.0
    early = shortfall(nothing, config, lengths, jnp.int32(0))  # ratio 1.3
    want = (1 - (40 / 1.3 - 4) / 36 + 1 - (16 / 1.3 - 4) / 12) / 2
    np.testing.assert_allclose(early, want, rtol=1e-5)


def test_dms_reaches_the_neuron_it_borrows():
    model = with_evictor(model_of(), Evictor(gain=1.0, offset=1.0))
    dms = recipe(dms=DMSConfig(window=4, ramp=1), evictor=Evictor())
    objective = make_objective(dms)
    graph, state = nnx.split(model)

    def loss(state):
        return objective(nnx.merge(graph, state), a_batch(), None)[0]

    slope = jax.jit(jax.grad(loss))(state)
    columns = slope["layers"]["attention"]["q"]["kernel"][...].reshape(2, 32, 4, 16)
    assert (np.abs(columns[:, :, ::2, -1]).max(axis=1) > 0).all()


def test_the_oracle_is_the_largest_later_weight():
    batch, found = a_batch(), []

    def look(inputs):
        found.append((inputs, oracle(inputs, batch.prompt_lengths, batch.later)))
        return causal_attention(inputs)

    positions = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
    model_of()(batch.tokens, positions, look, unroll=True)
    assert [inputs.depth.layer for inputs, _ in found] == list(range(SHAPE.num_layers))
    for inputs, ours in found:
        q, k = (np.asarray(x, np.float64) for x in (inputs.q, inputs.k))
        logits = np.einsum("bhtd,bhsd->bhts", q, np.repeat(k, 2, axis=1))
        t = np.arange(q.shape[2])
        logits = np.where(t[None, :] <= t[:, None], logits * inputs.spec.scale, -np.inf)
        weight = np.exp(logits - logits.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        for row, n in enumerate(np.asarray(batch.prompt_lengths)):
            want = weight[row, :, n:].max(axis=1).reshape(2, 2, -1).max(axis=1)
            np.testing.assert_allclose(ours[row], want, atol=1e-5)


def test_a_surrogate_learns_and_the_rest_stays(tmp_path):
    config = recipe(
        evictor=Evictor(kind="mlp", hidden=16),
        surrogate=SurrogateConfig(),
        objective=ObjectiveConfig(next_token=0.0),
        trainable=("*.retention.*",),
        optimizer=OptimizerConfig(name="adamw", learning_rate=0.01, warmup=1, decay=1),
        log_every=1,
    )
    stage = dataclasses.replace(STAGES[0], steps=25)
    run(dataclasses.replace(config, stages=(stage,)), tmp_path)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines if "surrogate" in line]
    assert events[-1]["surrogate"] < 0.7 * events[0]["surrogate"]
    model, _ = load(tmp_path / "model", "float32", tokenizer=False)
    after = params_of(model)
    for name, before in params_of(model_of()).items():
        stored = before.astype("bfloat16").astype("float32")
        np.testing.assert_array_equal(after[name], stored)
