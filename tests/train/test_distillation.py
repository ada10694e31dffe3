"""Terms that follow the inside of a teacher's pass."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kvjax
from kvjax.attention import causal_attention
from kvjax.depth import Depth
from kvjax.models import Decoder
from kvjax.models.config import Evictor
from kvjax.models.decoder import attending
from kvjax.models.evictor import with_evictor
from kvjax.models.simulate import simulated
from kvjax.train.data.batch import TokenBatch
from kvjax.train.objectives import losses
from kvjax.train.objectives.distillation import behind
from kvjax.train.objectives.objective import make_objective
from kvjax.train.objectives.passes import plain_states, watched
from kvjax.train.recipe import (
    CachedConfig,
    DMSConfig,
    LoRAConfig,
    ObjectiveConfig,
    OptimizerConfig,
)
from kvjax.train.run import run
from kvjax.train.run.model import weights_of
from tests.train.small import SHAPE, a_batch, model_of, predictions, recipe

KNORM = kvjax.compression("knorm", **{"evict.budget.keep": 0.4})
ALL: dict[str, Any] = {
    "hidden": 0.5,
    "attention": 0.25,
    "hidden_layers": "all",
    "tokens": "behind",
}


def another(seed: int = 1) -> Decoder:
    return Decoder(SHAPE, rngs=nnx.Rngs(seed))


def walk(model: Decoder, batch: TokenBatch, attention):
    """Residual streams, the last one normed, and attention outputs, layer by layer."""
    positions = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
    x, streams, outputs = model.embed(batch.tokens), [], []
    asked = attending(attention)
    state, kinds = asked.state, asked.kinds or (None,) * model.config.num_layers
    for index, spec in enumerate(model.config.layers):

        def kept(inputs, state=state):
            out, *more = asked.step(inputs, state)
            outputs.append(out)
            return out, *more

        depth = Depth(layer=index, kind=kinds[index])
        x, (state, _) = model.layer(index)(x, positions, spec, depth, kept)
        streams.append(x)
    streams[-1] = model.norm(x)
    return streams, outputs


def error(ours, wanted, places: tuple[list[int], list[int]]):
    """Of arrays `[B, T, C]` at (rows, tokens), as the docs say it."""
    ours, wanted = ours[places], wanted[places]
    return jnp.mean((ours - wanted) ** 2) / jnp.mean(wanted**2)


def counted(batch: TokenBatch, tokens: str) -> tuple[list[int], list[int]]:
    """Rows and tokens whose next token is an answer, or lies behind the point."""
    flags, weights = np.asarray(batch.answers), np.asarray(batch.weights)
    rows, places = [], []
    for row, point in enumerate(np.asarray(batch.prompt_lengths)):
        end = max(np.flatnonzero(weights[row])) + 1
        targets = np.flatnonzero(flags[row])
        targets = range(point, end) if tokens == "behind" else targets
        places += [int(t) - 1 for t in targets]
        rows += [row for _ in targets]
    return rows, places


def rows_of(outputs):
    """`[B H T D]` with the heads of a token side by side."""
    return [out.transpose(0, 2, 1, 3).reshape(*out.shape[::2], -1) for out in outputs]


@pytest.mark.sweep(1, 2)
@pytest.mark.parametrize(("layers", "tokens"), [("last", "answers"), ("all", "behind")])
def test_terms_and_their_gradient(layers, tokens):
    """Against a walk over the layers, with the sums written out."""
    batch, teacher, student = a_batch(), model_of(), another()
    weights: dict[str, Any] = {"hidden": 0.5, "attention": 0.25}
    config = ObjectiveConfig(
        next_token=0.0, hidden_layers=layers, tokens=tokens, **weights
    )
    objective = make_objective(recipe(objective=config), KNORM)
    places = counted(batch, tokens)
    graph, state = nnx.split(student)

    def ours(state):
        return objective(nnx.merge(graph, state), batch, teacher)

    def theirs(state):
        aims = walk(teacher, batch, causal_attention)
        wanted, attended = jax.lax.stop_gradient(aims)
        model: Decoder = nnx.merge(graph, state)
        rows = (batch.prompt_lengths, batch.tokens)
        attention = simulated(model, *rows, KNORM, batch.later)
        streams, outputs = walk(model, batch, attention)
        pairs = list(zip(streams, wanted, strict=True))
        pairs = pairs if layers == "all" else pairs[-1:]
        heads = zip(rows_of(outputs), rows_of(attended), strict=True)
        terms = {
            "hidden": [error(x, y, places) for x, y in pairs],
            "attention": [error(x, y, places) for x, y in heads],
        }
        means = {name: sum(found) / len(found) for name, found in terms.items()}
        return sum(weights[name] * means[name] for name in means), means

    (loss, metrics), slope = jax.jit(jax.value_and_grad(ours, has_aux=True))(state)
    (want, means), want_slope = jax.jit(jax.value_and_grad(theirs, has_aux=True))(state)
    np.testing.assert_allclose(loss, want, rtol=1e-4)
    for name, value in means.items():
        assert value > 0.01
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4)
    pairs = zip(jax.tree.leaves(slope), jax.tree.leaves(want_slope), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-3)


def jitted(objective, teacher: Decoder, student: Decoder):
    """Of a batch alone."""
    return lambda batch: objective(student, batch, teacher)


def test_contexts_follow_the_teacher_whatever_is_compressed(monkeypatch):
    """Against a sum over tokens; other tokens in every step, and all in four."""
    monkeypatch.setattr(losses, "FEW", 0)  # what counts is put in front
    config = ObjectiveConfig(next_token=0.0, distill_context=2.0)
    batch, teacher, student = a_batch(), model_of(), another()
    compressed, plain = (
        jax.jit(jitted(make_objective(recipe(objective=config), c), teacher, student))
        for c in (KNORM, None)
    )
    p, q = (
        np.asarray(jax.nn.log_softmax(model.logits(plain_states(model, batch.tokens))))
        for model in (teacher, student)
    )
    apart, seen = (np.exp(p) * (p - q)).sum(-1), set()
    for step in range(4):
        batch = dataclasses.replace(batch, step=jnp.asarray(step))
        places = [
            (row, at - 1)
            for row, point in enumerate(np.asarray(batch.prompt_lengths))
            for at in range(1, point)
            if (at + step) % 4 == 0
        ]
        seen |= set(places)
        loss, metrics = compressed(batch)
        want = np.mean([apart[at] for at in places])
        np.testing.assert_allclose(metrics["distill_context"], want, rtol=1e-4)
        np.testing.assert_allclose(loss, 2 * want, rtol=1e-4)
        np.testing.assert_allclose(plain(batch)[0], loss, rtol=1e-4)
    assert len(seen) == int((batch.prompt_lengths - 1).sum())


def test_a_model_is_at_no_distance_from_itself():
    config = ObjectiveConfig(next_token=0.0, **ALL)
    objective, model = make_objective(recipe(objective=config)), model_of()
    loss, metrics = objective(model, a_batch(), model)
    assert loss == metrics["hidden"] == metrics["attention"] == 0.0


def test_no_gradient_reaches_the_teacher():
    config = ObjectiveConfig(next_token=0.0, distill=1.0, **ALL)
    objective, (graph, state) = (
        make_objective(recipe(objective=config)),
        nnx.split(another()),
    )

    @jax.jit
    @jax.grad
    def slope_of(state):
        return objective(model_of(), a_batch(), nnx.merge(graph, state))[0]

    slope = slope_of(state)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(slope))


def test_places_behind_the_point_end_with_the_last_target():
    flags = jnp.array([[0, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0]], bool)
    weights = jnp.array([[0.0, 0, 0, 0, 1, 0], [0.1, 1, 0, 1, 0.1, 0.1]])
    found = behind(flags, weights, jnp.array([2, 4]))
    want = [[0, 1, 1, 1, 0], [0, 0, 0, 1, 1]]  # tokens 2..4 and 4..5, predicted
    np.testing.assert_array_equal(found, np.array(want, bool))


def test_what_has_no_weight_is_not_computed(monkeypatch):
    """One pass of each model serves all terms; without terms there is no second one."""
    calls, call = [], Decoder.run

    def noted(self, *args, **kwargs):
        calls.append(self)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Decoder, "run", noted)
    batch, model, teacher = a_batch(), model_of(), another()
    programs = []
    silent = ObjectiveConfig(hidden_layers="all", tokens="behind")
    for config in (ObjectiveConfig(), silent):
        objective = make_objective(recipe(objective=config), KNORM)
        programs.append(str(jax.make_jaxpr(lambda b, o=objective: o(model, b))(batch)))
    assert programs[0] == programs[1]
    assert len(calls) == 2
    calls.clear()
    config = ObjectiveConfig(distill=1.0, **ALL)
    make_objective(recipe(objective=config), KNORM)(model, batch, teacher)
    assert calls == [model, teacher]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chunkkv", "dms"])
def test_recomputed_layers_and_watching_change_nothing(name):
    """What attention carries goes on below; `remat` gives the same numbers."""
    model, batch = with_evictor(model_of(), Evictor(gain=1.0, offset=1.0)), a_batch()
    graph, state = nnx.split(model)
    fields, c = {"dms": DMSConfig(window=4), "evictor": Evictor()}, None
    if name != "dms":
        fields, c = {}, kvjax.compression(name)

    def value_and_slope(remat, **terms):
        config = recipe(remat=remat, objective=ObjectiveConfig(**terms), **fields)
        objective = make_objective(config, c)

        def loss(state):
            return objective(nnx.merge(graph, state), batch, another())

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(state)

    (plain, metrics), one = value_and_slope(False, **ALL)
    (again, _), other = value_and_slope(True, **ALL)
    np.testing.assert_allclose(plain, again, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    (_, alone), _ = value_and_slope(False)
    for key, value in alone.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-6)
    assert set(metrics) == {*alone, "hidden", "attention"}


def test_watching_a_pass_of_sixteen_bits():
    weights = ObjectiveConfig(**ALL)
    model = Decoder(SHAPE, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    seen = watched(model, a_batch().tokens, causal_attention, weights)
    assert seen.hidden is not None and seen.attention is not None
    assert len(seen.hidden) == len(seen.attention) == SHAPE.num_layers
    assert {x.dtype for x in jax.tree.leaves(seen)} == {jnp.dtype(jnp.bfloat16)}
    logits = model.logits(seen.last)[:, :-1]
    np.testing.assert_array_equal(logits, predictions(model, a_batch()))
    config = recipe(objective=weights)
    _, metrics = make_objective(config, KNORM)(model, a_batch(), another())
    assert metrics["hidden"].dtype == metrics["attention"].dtype == jnp.float32


def test_a_run_with_low_rank_updates_follows_its_own_weights(tmp_path):
    config = recipe(
        objective=ObjectiveConfig(**ALL),
        lora=LoRAConfig(rank=4, modules=("q", "v")),
        optimizer=OptimizerConfig(learning_rate=0.05, warmup=1, decay=1),
        cached=CachedConfig(items=0),
        log_every=1,
    )
    weights, _ = weights_of(config)
    assert not weights.guide, "the teacher has no weights of its own"
    stage = dataclasses.replace(config.stages[0], steps=2)
    run(dataclasses.replace(config, stages=(stage,)), tmp_path)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    first, second = [e for e in map(json.loads, lines) if "hidden" in e]
    for name in ("hidden", "attention"):
        assert first[name] < 1e-12 < 1e-6 < second[name]  # first the teacher itself


@pytest.mark.parametrize("field", ["hidden_layers", "tokens"])
def test_unknown_words_are_named(field):
    fields: dict[str, Any] = {field: "al"}
    with pytest.raises(ValueError, match=f"ObjectiveConfig.{field}` must be one of"):
        ObjectiveConfig(**fields)
