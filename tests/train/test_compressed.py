"""Training under compression: the simulated pass, sampled methods, DMS."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kvjax
from kvjax.models import Decoder, DecoderConfig
from kvjax.models.attention import causal_attention
from kvjax.models.config import Evictor
from kvjax.models.evictor import with_evictor
from kvjax.models.io import load, save
from kvjax.prefills import Delayed
from kvjax.rope import Rope
from kvjax.train.config import (
    Choice,
    DataConfig,
    DMSConfig,
    LoRAConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SamplingConfig,
    Source,
    Stage,
    SurrogateConfig,
    TrainConfig,
)
from kvjax.train.data import Mixture
from kvjax.train.dms import relaxed, shortfall
from kvjax.train.loop import init_state, make_step
from kvjax.train.lora import merged, with_lora
from kvjax.train.objective import (
    Batch,
    distillation,
    make_objective,
    next_token,
    predictions,
)
from kvjax.train.optimizer import make_optimizer
from kvjax.train.params import params_of
from kvjax.train.run import run, weights_of
from kvjax.train.sampling import Sampler
from kvjax.train.surrogate import oracle

SHAPE = DecoderConfig(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope=Rope(head_dim=16),
    tie_embeddings=True,
    init_std=0.2,
)
DATA = DataConfig(sources=(Source(task="recall"),), turns=2)
STAGES = (Stage(steps=3, lengths={96: 1.0}, tokens_per_step=288),)


def model_of(config: DecoderConfig = SHAPE) -> Decoder:
    return Decoder(config, rngs=nnx.Rngs(0))


def recipe(**fields) -> TrainConfig:
    return TrainConfig(model=SHAPE, data=DATA, stages=STAGES, **fields)


def a_batch(visible: float = 0.5) -> Batch:
    return Mixture(DATA, STAGES, 0, visible).batch(0)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("snapkv", {"evict.score.window": 8, "evict.budget.keep": 0.4}),
        ("kivi_2bit", {"store.residual": 0}),
        ("quest", {"read.slots": 16, "read.dense_layers": 0}),
    ],
)
def test_the_loss_is_that_of_simulate(name, fields):
    """A bound on the later tokens saves work and changes nothing."""
    c, model, batch = kvjax.compression(name, **fields), model_of(), a_batch()
    loss, metrics = make_objective(recipe(), c)(model, batch, None)
    lengths = jnp.full(batch.tokens.shape[:1], batch.tokens.shape[1])
    logits = kvjax.simulate(model, batch.tokens, lengths, batch.prompt_lengths, c)
    want, _ = next_token(logits[:, :-1], batch)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    plain, _ = make_objective(recipe())(model, batch, None)
    assert abs(float(plain - loss)) > 1e-4
    assert set(metrics) == {"answer_loss", "answer_accuracy", "exact"}


def test_rows_are_compressed_before_or_behind_the_question():
    hidden, visible, some = (a_batch(share) for share in (0.0, 1.0, 0.5))
    np.testing.assert_array_equal(hidden.tokens, visible.tokens)
    assert (hidden.prompt_lengths < visible.prompt_lengths).all()
    assert np.isin(
        some.prompt_lengths,
        np.concatenate([hidden.prompt_lengths, visible.prompt_lengths]),
    ).all()
    first = np.argmax(np.asarray(visible.answers), axis=1)
    np.testing.assert_array_equal(visible.prompt_lengths, first)


def test_distillation_is_zero_from_oneself():
    model, batch = model_of(), a_batch()
    config = recipe(objective=ObjectiveConfig(next_token=0.0, distill=1.0))
    loss, metrics = make_objective(config)(model, batch, model)
    np.testing.assert_allclose(loss, 0.0, atol=1e-6)
    other = Decoder(SHAPE, rngs=nnx.Rngs(1))
    loss, metrics = make_objective(config)(model, batch, other)
    ours, theirs = (predictions(m, batch) for m in (model, other))
    chosen = np.asarray(batch.answers[:, 1:])
    p, q = (np.asarray(jax.nn.log_softmax(x), np.float64) for x in (theirs, ours))
    want = (np.exp(p) * (p - q)).sum(-1)[chosen].mean()
    np.testing.assert_allclose(loss, want, rtol=1e-4)
    np.testing.assert_allclose(metrics["distill"], want, rtol=1e-4)
    assert distillation(ours, ours, batch) == 0.0


def test_sampler_goes_from_mild_to_hard():
    choices = (
        Choice(compression="none"),
        Choice(compression="knorm", keeps=(0.5, 0.25, 0.125), weight=3.0),
    )
    sampler = Sampler(SamplingConfig(choices=choices, ramp=300), seed=0)
    again = Sampler(SamplingConfig(choices=choices, ramp=300), seed=0)
    names = [sampler.at(step).name for step in range(2000)]  # type: ignore
    assert names == [again.at(step).name for step in range(2000)]  # type: ignore
    assert set(names[:100]) == {"none", "knorm-keep0.5"}
    assert set(names[300:]) == {"none", *(f"knorm-keep{k}" for k in (0.5, 0.25, 0.125))}
    assert 0.2 < names.count("none") / len(names) < 0.3
    assert Sampler(SamplingConfig(), seed=0).at(0) is None


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(compression="snapvk"), r"choices\[0\].*Did you mean 'snapkv'"),
        (Choice(compression="kivi_2bit", keeps=(0.5,)), r"choices\[0\].*"),
        (Choice(compression="knorm", fields={"evict.socre": 1}), "evict|socre"),
    ],
)
def test_a_wrong_choice_is_named(choice, message):
    with pytest.raises(ValueError, match=message):
        Sampler(SamplingConfig(choices=(choice,)), seed=0)


def test_recipes_that_contradict_themselves():
    given = {"data": DATA, "stages": STAGES}
    with pytest.raises(ValueError, match="`model`.*or `init`.*neither"):
        TrainConfig(**given)
    with pytest.raises(ValueError, match="needs an `evictor`"):
        TrainConfig(**given, model=SHAPE, dms=DMSConfig())
    sampling = SamplingConfig(choices=(Choice(compression="none"),))
    with pytest.raises(ValueError, match="exclude each other"):
        TrainConfig(
            **given,
            model=SHAPE,
            dms=DMSConfig(),
            evictor=Evictor(),
            sampling=sampling,
        )
    with pytest.raises(ValueError, match="above 1"):
        DMSConfig(ratio=1.0)


def test_an_evictor_starts_by_keeping_everything(tmp_path):
    base = model_of()
    model = with_evictor(base, Evictor(kind="neuron", offset=3.0))
    seen = []

    def look(inputs):
        seen.append(inputs.retention)
        return causal_attention(inputs)

    tokens = a_batch().tokens
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = model(tokens, positions, look)
    assert len(seen) == SHAPE.num_layers
    for retention in seen:
        np.testing.assert_array_equal(retention, np.full((3, 2, 96), 3.0))
    save(model, tmp_path)
    again, _ = load(tmp_path, "float32", tokenizer=False)
    assert again.config == model.config
    np.testing.assert_array_equal(again(tokens, positions, look), hidden)
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
    for layer in model.layers:
        kernel = layer.attention.q.kernel
        kernel[...] = jnp.asarray(noise.normal(size=kernel.shape) * 0.2, jnp.float32)
    return model


def test_relaxed_evictions_become_the_delayed_ones():
    """With decisions beyond doubt the relaxed pass is the masked one."""
    model, batch = retained(0, 1e5), a_batch()
    soft = relaxed(DMSConfig(window=8), batch.prompt_lengths, jnp.int32(0))
    found = predictions(model, batch, soft)
    hard = Delayed(window=8)
    want = predictions(model, batch, lambda x: hard.attend(x, x.positions, False)[0])
    np.testing.assert_allclose(found, want, atol=2e-4)
    full = predictions(model, batch)
    assert float(jnp.abs(full - want).max()) > 1e-2
    assert 0.0 <= float(soft.state) < 1.0


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

    slope = jax.grad(loss)(state)
    columns = slope["layers"][0]["attention"]["q"]["kernel"][...].reshape(32, 4, 16)
    assert (np.abs(columns[:, ::2, -1]).max(axis=0) > 0).all()


def test_a_run_from_a_checkpoint_under_compression(tmp_path):
    save(model_of(), tmp_path / "base")
    choices = (Choice(compression="none"), Choice(compression="knorm", keeps=(0.5,)))
    config = TrainConfig(
        init=str(tmp_path / "base"),
        data=DATA,
        stages=STAGES,
        sampling=SamplingConfig(choices=choices),
        objective=ObjectiveConfig(distill=0.5),
        log_every=1,
        eval_every=3,
        save_every=3,
        eval_items=1,
    )
    run(config, tmp_path / "whole")
    lines = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    steps = [event for event in events if "compression" in event]
    sampler = Sampler(config.sampling, config.seed)
    assert [e["compression"] for e in steps] == [sampler.at(i).name for i in range(3)]  # type: ignore
    assert all(event["distill"] >= 0 for event in steps)
    shorter = dataclasses.replace(
        config, stages=(dataclasses.replace(STAGES[0], steps=3),)
    )
    run(shorter, tmp_path / "whole")  # nothing left to do
    assert len((tmp_path / "whole" / "log.jsonl").read_text().splitlines()) == len(
        lines
    )


@pytest.mark.parametrize("name", ["chunkkv", "knorm"])
def test_recomputed_layers_change_nothing(name):
    """`chunkkv` hands indices from layer to layer, which `remat` must carry."""
    c = kvjax.compression(name)
    model, batch = model_of(), a_batch()
    graph, state = nnx.split(model)

    def slope(remat):
        objective = make_objective(recipe(remat=remat), c)
        loss = lambda s: objective(nnx.merge(graph, s), batch, None)[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(state)

    (plain, one), (again, other) = slope(False), slope(True)
    np.testing.assert_allclose(plain, again, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_only_what_is_named_is_trained(tmp_path):
    fast = OptimizerConfig(learning_rate=0.05, warmup=1, decay=1)
    config = recipe(trainable=("*.attention.k.kernel", "norm.weight"), optimizer=fast)
    weights, params = weights_of(config)
    before = params_of(model_of())
    assert set(params) == {
        "norm.weight",
        *(f"layers.{i}.attention.k.kernel" for i in range(SHAPE.num_layers)),
    }
    assert set(params) | set(weights.fixed) == set(before)
    run(dataclasses.replace(config, log_every=1), tmp_path)
    model, _ = load(tmp_path / "model", "float32", tokenizer=False)
    for name, after in params_of(model).items():
        stored = before[name].astype("bfloat16").astype("float32")
        assert np.array_equal(after, stored) == (name not in params), name
    with pytest.raises(ValueError, match="matches no weight.*Did you mean"):
        weights_of(recipe(trainable=("layers.0.attention.kk.kernel",)))


def test_lora_starts_as_the_model_and_merges_into_it(tmp_path):
    lora = LoRAConfig(rank=4, modules=("q", "v", "down"))
    config = recipe(lora=lora, objective=ObjectiveConfig(distill=1.0), log_every=1)
    weights, params = weights_of(config)
    assert len(params) == 2 * 3 * SHAPE.num_layers
    for name, array in weights.guide.items():
        assert array is weights.fixed[name], "the teacher has no weights of its own"
    batch = a_batch()
    start = predictions(weights.joined(params, weights.fixed), batch)
    np.testing.assert_array_equal(start, predictions(model_of(), batch))
    noise = np.random.default_rng(0)
    moved = {k: x + noise.normal(size=x.shape) * 0.1 for k, x in params.items()}
    moved = {k: jnp.asarray(x, jnp.float32) for k, x in moved.items()}
    tuned = weights.joined(moved, weights.fixed)
    found, plain = predictions(tuned, batch), merged(tuned)
    assert set(params_of(plain)) == set(params_of(model_of()))
    np.testing.assert_allclose(predictions(plain, batch), found, atol=1e-4)
    assert float(jnp.abs(found - start).max()) > 1e-2
    run(config, tmp_path)
    load(tmp_path / "model", "float32", tokenizer=False)
    with pytest.raises(ValueError, match="'gates'.*Did you mean 'gate'"):
        with_lora(model_of(), LoRAConfig(modules=("gates",)))


def test_the_oracle_is_the_largest_later_weight():
    batch, found = a_batch(), []

    def look(inputs):
        found.append((inputs, oracle(inputs, batch.prompt_lengths, batch.later)))
        return causal_attention(inputs)

    predictions(model_of(), batch, look)
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


def test_accumulated_batches_are_one_update(tmp_path):
    config = recipe(
        optimizer=OptimizerConfig(name="adamw", accumulate=3, warmup=1, decay=1)
    )
    weights, params = weights_of(config)
    optimizer = make_optimizer(config.optimizer, 3)
    step = make_step(weights, make_objective(config), optimizer)
    state = init_state(params_of(weights.model), optimizer)
    for number in range(3):
        batch = Mixture(DATA, STAGES, 0).batch(number)
        old = jax.tree.map(np.asarray, state.params)
        state, _ = step(state, batch, weights.arrays)
        moved = any((old[k] != np.asarray(x)).any() for k, x in state.params.items())
        assert moved == (number == 2)


def test_bfloat16_passes_keep_float32_weights():
    config = recipe(compute="bfloat16")
    weights, params = weights_of(config)
    assert {x.dtype.name for x in params.values()} == {"float32"}
    assert weights.joined(params, weights.fixed).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="`compute` must be one of"):
        recipe(compute="float16")
