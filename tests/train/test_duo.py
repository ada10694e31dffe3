"""Gates of heads: what they mix, what they learn from, where they end."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kvjax
from kvjax.attention import causal_attention
from kvjax.depth import Depth
from kvjax.models import Decoder
from kvjax.models.gates import with_gates
from kvjax.models.io import load, save
from kvjax.train.objectives.duo import GatedDecoder, exported, mixed
from kvjax.train.objectives.objective import make_objective
from kvjax.train.recipe import (
    CachedConfig,
    CompressionChoice,
    DuoConfig,
    ObjectiveConfig,
    OptimizerConfig,
)
from kvjax.train.run import run
from kvjax.train.run.optimizer import make_optimizer
from kvjax.train.run.params import params_of, with_params
from tests import reference
from tests.compress.samples import draw, layer_spec
from tests.train.small import SHAPE, STAGES, a_batch, model_of, recipe

DUO = DuoConfig(sink=2, recent=5, weight=0.05)
ALONE = ObjectiveConfig(next_token=0.0)


def test_a_gate_mixes_full_and_streaming_attention():
    """At 1 a head is the plain one, at 0 the streaming one of the paper."""
    sample = draw(0, layer_spec(6, 3, 16), (40, 23))
    inputs = dataclasses.replace(sample.inputs, depth=Depth(layer=1))
    gates = jnp.array([[0.5, 0.5, 0.5], [1.0, 0.0, 0.25]])
    found = mixed(DUO, gates)(inputs)
    plain = causal_attention(inputs)
    np.testing.assert_array_equal(found[:, :2], plain[:, :2])
    for row, n in enumerate(sample.lengths):
        q, k, v = sample.row(row)
        seen = reference.streaming_mask(int(n), sink=2, recent=5)
        ends = reference.attend(q, k, v, np.broadcast_to(seen, (6, n, n)))
        full = reference.attend(q, k, v, np.broadcast_to(np.tri(n) > 0, (6, n, n)))
        got = np.asarray(found)[row, :, :n]
        np.testing.assert_allclose(got[2:4], ends[2:4], atol=1e-5)
        mix = 0.25 * full + 0.75 * ends
        np.testing.assert_allclose(got[4:], mix[4:], atol=1e-5)
        assert np.abs(full - ends).max() > 0.1


def value_of(gates, remat: bool = False):
    """Loss and metrics at some gates."""
    model = with_params(GatedDecoder(model_of()), {"gates": gates})
    config = recipe(duo=DUO, objective=ALONE, remat=remat)
    return make_objective(config)(model, a_batch(), None)


@pytest.mark.slow
def test_the_loss_is_that_of_the_paper():
    batch, ones = a_batch(), jnp.ones((2, 2))
    loss, metrics = value_of(ones)
    assert metrics["distance"] == 0.0 and float(loss) == pytest.approx(0.05)
    gates = jnp.array([[0.9, 0.2], [0.6, 0.1]])
    loss, metrics = value_of(gates)
    model = model_of()
    at = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
    full, ours = (
        np.asarray(model(batch.tokens, at, how), np.float64)
        for how in (causal_attention, mixed(DUO, gates))
    )
    before = np.asarray(batch.answers)[:, 1:]  # what says an answer's token
    want = np.square(full - ours)[:, :-1].mean(-1)[before].mean()
    assert want > 1e-3
    np.testing.assert_allclose(metrics["distance"], want, rtol=1e-4)
    np.testing.assert_allclose(loss, want + 0.05 * 0.45, rtol=1e-4)


def test_every_gate_has_the_slope_of_the_loss():
    gates = jnp.array([[0.9, 0.2], [0.6, 0.3]])
    run = jax.jit(jax.value_and_grad(lambda g: value_of(g)[0]))
    _, slope = run(gates)
    _, again = jax.jit(jax.value_and_grad(lambda g: value_of(g, remat=True)[0]))(gates)
    np.testing.assert_allclose(again, slope, rtol=1e-4)
    step = 0.01
    for at in np.ndindex(2, 2):
        there, back = (run(gates.at[at].add(x))[0] for x in (step, -step))
        measured = float(there - back) / (2 * step)
        np.testing.assert_allclose(slope[at], measured, rtol=0.05)
        assert abs(measured - 0.05 / 4) > 1e-4  # more than the penalty reaches it


def test_gates_stay_between_their_bounds():
    fast = OptimizerConfig(name="adamw", learning_rate=0.3, warmup=1, decay=1)
    for accumulate in (1, 2):
        config = dataclasses.replace(fast, accumulate=accumulate)
        optimizer = make_optimizer(config, 100, (0.0, 1.0))
        params: Any = {"gates": jnp.array([0.9, 0.1, 0.5])}
        state = optimizer.init(params)
        slope = {"gates": jnp.array([-1.0, 1.0, 0.0])}
        for _ in range(6):
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(slope, state, params)
            params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["gates"], [1.0, 0.0, 0.5], atol=5e-2)
        assert params["gates"][0] == 1.0 and params["gates"][1] == 0.0


def test_gates_end_in_the_config_and_survive_a_file(tmp_path):
    base = model_of()
    gated = with_params(
        GatedDecoder(base), {"gates": jnp.array([[0.25, 1.0], [0.0, 0.123456]])}
    )
    plain = exported(gated)
    assert type(plain) is Decoder and exported(plain) is plain
    assert plain.config.head_gates == ((0.25, 1.0), (0.0, 0.123456))
    assert [spec.head_ranks for spec in plain.config.layers] == [(1, 0), (3, 2)]
    save(plain, tmp_path)
    again, _ = load(tmp_path, "float32", tokenizer=False)
    assert again.config == plain.config
    theirs = params_of(again)
    assert theirs.keys() == params_of(base).keys()
    for name, weight in params_of(base).items():
        np.testing.assert_array_equal(theirs[name], weight)
    # Training goes on from gates that are there.
    np.testing.assert_allclose(
        params_of(GatedDecoder(again))["gates"], plain.config.head_gates
    )
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["kvjax_head_gates"]  # a file from before there were any
    (tmp_path / "config.json").write_text(json.dumps(settings))
    old, _ = load(tmp_path, "float32", tokenizer=False)
    assert old.config == SHAPE and with_gates(old, np.ones((2, 2))).config != SHAPE
    settings["kvjax_head_gates"] = [[0.5], 0.5]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="kvjax_head_gates.1` must be a list; got 0.5"):
        load(tmp_path, "float32", tokenizer=False)


@pytest.mark.slow
def test_a_run_trains_gates_and_nothing_else(tmp_path):
    asked = CompressionChoice(compression="duo", fields={"evict.budget.others": 8})
    config = recipe(
        duo=DuoConfig(sink=2, recent=5, weight=5.0),
        objective=ALONE,
        optimizer=OptimizerConfig(name="adamw", learning_rate=0.02, warmup=1, decay=1),
        cached=CachedConfig(items=1, choices=(asked,)),
        log_every=1,
        eval_items=1,
    )
    stages = (dataclasses.replace(STAGES[0], steps=8),)
    run(dataclasses.replace(config, stages=stages), tmp_path)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    steps = [event for event in events if "distance" in event]
    assert steps[-1]["gates"] < 0.95 < steps[0]["gates"] == 1.0
    assert steps[-1]["distance"] > steps[0]["distance"] == 0.0
    assert {e["cached"] for e in events if "cached" in e} == {"full", "duo"}
    model, _ = load(tmp_path / "model", "float32", tokenizer=False)
    gates = np.array(model.config.head_gates)
    assert gates.shape == (2, 2) and (gates < 1.0).all()
    assert len(np.unique(gates)) == 4
    after = params_of(model)
    for name, before in params_of(model_of()).items():
        stored = before.astype("bfloat16").astype("float32")
        np.testing.assert_array_equal(after[name], stored)
    c = kvjax.compression("duo", **{"evict.budget.others": 8})
    _, cache = kvjax.prefill(model, np.ones((1, 64), np.int32), c=c)
    kept = [len(h) for layer in (0, 1) for h in cache.kept_positions(layer)[0]]
    assert kept == [64 if x >= np.median(gates) else 8 for x in gates.ravel()]


def test_gates_are_trained_alone():
    with pytest.raises(ValueError, match="got `trainable` too"):
        recipe(duo=DUO, trainable=("*norm*",))
    with pytest.raises(ValueError, match="recent` must be an integer >= 1; got 0"):
        DuoConfig(recent=0)
