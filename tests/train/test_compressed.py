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
    ObjectiveConfig,
    SamplingConfig,
    Source,
    Stage,
    TrainConfig,
)
from kvjax.train.data import Mixture
from kvjax.train.dms import relaxed, shortfall
from kvjax.train.objective import (
    Batch,
    distillation,
    make_objective,
    next_token,
    predictions,
)
from kvjax.train.run import run
from kvjax.train.sampling import Sampler

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
    loss, metrics = make_objective(ObjectiveConfig(), c)(model, batch, None)
    lengths = jnp.full(batch.tokens.shape[:1], batch.tokens.shape[1])
    logits = kvjax.simulate(model, batch.tokens, lengths, batch.prompt_lengths, c)
    want, _ = next_token(logits[:, :-1], batch)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    plain, _ = make_objective(ObjectiveConfig())(model, batch, None)
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
    config = ObjectiveConfig(next_token=0.0, distill=1.0)
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
    with pytest.raises(ValueError, match="`dms` needs an `evictor`"):
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
    config, shortfalls = DMSConfig(window=8), []
    soft = relaxed(config, batch.prompt_lengths, jnp.int32(0), shortfalls)
    found = predictions(model, batch, soft)
    hard = Delayed(window=8)
    want = predictions(model, batch, lambda x: hard.attend(x, x.positions, False)[0])
    np.testing.assert_allclose(found, want, atol=2e-4)
    full = predictions(model, batch)
    assert float(jnp.abs(full - want).max()) > 1e-2
    assert len(shortfalls) == SHAPE.num_layers


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
    objective = make_objective(ObjectiveConfig(), dms=DMSConfig(window=4, ramp=1))
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
