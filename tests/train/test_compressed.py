"""Training under compression: the simulated pass, sampled methods."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kvjax
from kvjax.models import Decoder
from kvjax.models.config import Evictor
from kvjax.models.io import save
from kvjax.train.data.sampling import Sampler
from kvjax.train.objectives.losses import divergence
from kvjax.train.objectives.objective import make_objective
from kvjax.train.recipe import (
    CompressionChoice,
    DMSConfig,
    ObjectiveConfig,
    SamplingConfig,
    TrainConfig,
)
from kvjax.train.run import run
from tests.train.small import (
    DATA,
    SHAPE,
    STAGES,
    a_batch,
    model_of,
    predictions,
    recipe,
)


@pytest.mark.sweep(1, 2)
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("snapkv", {"evict.score.window": 8, "evict.budget.keep": 0.4}),
        ("kivi_2bit", {"store.residual": 0}),
        ("quest", {"read.slots": 16, "layers": []}),
    ],
)
def test_the_loss_is_that_of_simulate(name, fields):
    """A bound on the later tokens saves work and changes nothing."""
    c, model, batch = kvjax.compression(name, **fields), model_of(), a_batch()
    losses = (nnx.jit(make_objective(recipe(), *how)) for how in ((c,), ()))
    (loss, metrics), (plain, _) = (run(model, batch, None) for run in losses)
    lengths = jnp.full(batch.tokens.shape[:1], batch.tokens.shape[1])
    logits = kvjax.simulate(model, batch.tokens, lengths, batch.prompt_lengths, c)
    said = jax.nn.log_softmax(logits[:, :-1])
    targets = batch.tokens[:, 1:, None]
    each = -np.asarray(jnp.take_along_axis(said, targets, axis=-1))[..., 0]
    want = np.average(each, weights=batch.weights[:, 1:])
    np.testing.assert_allclose(loss, want, rtol=1e-5)
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
    assert not np.any(divergence(ours, ours))


def test_sampler_goes_from_mild_to_hard():
    choices = (
        CompressionChoice(compression="none"),
        CompressionChoice(compression="knorm", keeps=(0.5, 0.25, 0.125), weight=3.0),
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
        (
            CompressionChoice(compression="snapvk"),
            r"choices\[0\].*Did you mean 'snapkv'",
        ),
        (CompressionChoice(compression="kivi_2bit", keeps=(0.5,)), r"choices\[0\].*"),
        (
            CompressionChoice(compression="knorm", fields={"evict.socre": 1}),
            "evict|socre",
        ),
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
    sampling = SamplingConfig(choices=(CompressionChoice(compression="none"),))
    with pytest.raises(ValueError, match="exclude each other"):
        TrainConfig(
            **given,
            model=SHAPE,
            dms=DMSConfig(),
            evictor=Evictor(),
            sampling=sampling,
        )
    with pytest.raises(ValueError, match="must be a number > 1"):
        DMSConfig(ratio=1.0)


@pytest.mark.slow
def test_a_run_from_a_checkpoint_under_compression(tmp_path):
    save(model_of(), tmp_path / "base")
    choices = (
        CompressionChoice(compression="none"),
        CompressionChoice(compression="knorm", keeps=(0.5,)),
    )
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
    first, *others = (event["distill"] for event in steps)
    assert first == pytest.approx(0.0, abs=1e-6)  # the teacher itself, uncompressed
    assert all(distance > 0 for distance in others)
    shorter = dataclasses.replace(
        config, stages=(dataclasses.replace(STAGES[0], steps=3),)
    )
    run(shorter, tmp_path / "whole")  # nothing left to do
    assert len((tmp_path / "whole" / "log.jsonl").read_text().splitlines()) == len(
        lines
    )
