"""The loop: it learns, resumes where it stood, and refuses bad recipes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array

from kvjax.models.config import DecoderConfig
from kvjax.models.decoder import Decoder
from kvjax.rope import Rope
from kvjax.train.data import Mixture
from kvjax.train.data.sampling import Sampler
from kvjax.train.data.tokenizer import encode
from kvjax.train.objectives.objective import make_objective
from kvjax.train.recipe import (
    DataConfig,
    OptimizerConfig,
    Source,
    Stage,
    TrainConfig,
    bundled_recipes,
    load_config,
)
from kvjax.train.run.optimizer import make_optimizer, schedule
from kvjax.train.run.params import params_of
from kvjax.train.run.step import Weights, init_state, make_step
from kvjax.types import LayerInputs
from tests.train.small import predictions

RECIPE = "configs/train/kvjax_tiny.yaml"


@pytest.fixture
def config() -> TrainConfig:
    return TrainConfig(
        model=DecoderConfig(
            vocab_size=100,
            hidden_size=16,
            intermediate_size=32,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            rope=Rope(head_dim=8),
            tie_embeddings=True,
        ),
        data=DataConfig(sources=(Source(task="recall"), Source(task="fact"))),
        stages=(Stage(steps=4, lengths={64: 1.0, 96: 1.0}, tokens_per_step=192),),
        log_every=1,
        eval_every=4,
        save_every=2,
        eval_items=2,
    )


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_loss_falls_on_one_batch(config, name):
    model = Decoder(config.model, rngs=nnx.Rngs(0))
    fast = OptimizerConfig(name=name, learning_rate=0.01, warmup=1, decay=1)
    optimizer = make_optimizer(fast, 100)
    state = init_state(params_of(model), optimizer)
    weights = Weights(model=model, fixed={})
    step = make_step(weights, make_objective(config), optimizer)
    batch = Mixture(config.data, config.stages, 0).batch(0)
    state, first = step(state, batch, weights.arrays)
    for _ in range(10):
        state, last = step(state, batch, weights.arrays)
    assert float(last["loss"]) < 0.9 * float(first["loss"])
    assert step._cache_size() == 1


def written_out(inputs: LayerInputs) -> Array:
    """Attention with all its weights at once."""
    spec, at = inputs.spec, inputs.positions
    k, v = (jnp.repeat(x, spec.groups, axis=1) for x in (inputs.k, inputs.v))
    logits = jnp.einsum("BHTD,BHSD->BHTS", inputs.q, k) * spec.scale
    if spec.softcap is not None:
        logits = spec.softcap * jnp.tanh(logits / spec.softcap)
    distance = (at[:, :, None] - at[:, None, :])[:, None]
    seen = (distance >= 0) & (distance < (spec.window or at.shape[1]))
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
    return jnp.einsum("BHTS,BHSD->BHTD", weights, v)


@pytest.mark.parametrize(
    "change", [{}, {"windows": (8, None)}, {"attention_softcap": 0.05}], ids=str
)
def test_plain_passes_attend_as_the_layers_say(config, change):
    shape = dataclasses.replace(config.model, init_std=0.3, **change)
    model = Decoder(shape, rngs=nnx.Rngs(0))
    batch = Mixture(config.data, config.stages, 0).batch(0)
    got = predictions(model, batch)
    np.testing.assert_allclose(
        got, predictions(model, batch, written_out), rtol=1e-4, atol=1e-4
    )
    if change:
        same = nnx.merge(
            nnx.graphdef(Decoder(config.model, rngs=nnx.Rngs(0))), nnx.state(model)
        )
        assert not np.allclose(got, predictions(same, batch), atol=1e-2)


def test_batches_are_a_function_of_seed_and_step(config):
    one, two = (Mixture(config.data, config.stages, 7) for _ in range(2))
    other = Mixture(config.data, config.stages, 8)
    ahead = list(one.batches(1, 4))
    jax.tree.map(np.testing.assert_array_equal, ahead[2], two.batch(3))
    assert not np.array_equal(ahead[0].tokens[:1, :40], other.batch(1).tokens[:1, :40])
    for batch in ahead:
        assert batch.tokens.shape[1] in (64, 96)
        assert (batch.weights[batch.answers] == 1.0).all()
        assert (batch.weights[np.asarray(batch.tokens) == 0] == 0.0).all()


def test_a_stage_may_have_its_own_mixture(config):
    facts = Stage(steps=2, lengths={96: 1.0}, sources=(Source(task="fact"),))
    stages = (*config.stages, facts)
    plain = Mixture(config.data, config.stages, 0)
    mixture = Mixture(config.data, stages, 0)
    jax.tree.map(np.testing.assert_array_equal, plain.batch(3), mixture.batch(3))
    for step in (4, 9):  # past the last stage, the last stage goes on
        batch = mixture.batch(step)
        answers = np.asarray(batch.tokens)[np.asarray(batch.answers)]
        equals, letter, stop = answers.reshape(-1, len("=k]")).T
        assert set(equals) == set(encode("=")) and set(stop) == set(encode("]"))
        assert not {*letter} & {*equals, *stop}


@pytest.mark.parametrize(
    ("shape", "quarter"), [("linear", 0.75), ("cosine", (1 + 0.5**0.5) / 2)]
)
def test_schedule_warms_up_and_decays_to_zero(shape, quarter):
    config = OptimizerConfig(learning_rate=1.0, warmup=10, decay=20, schedule=shape)
    rate = schedule(config, 100)
    values = jnp.array([rate(i) for i in (0, 10, 79, 85, 90, 100, 110)])
    wanted = [0.1, 1.0, 1.0, quarter, 0.5, 0.0, 0.0]
    np.testing.assert_allclose(values, wanted, atol=1e-6)


def test_an_unknown_schedule_is_refused(repo):
    assert OptimizerConfig().schedule == "linear"
    with pytest.raises(ValueError, match="'cosin'.*Did you mean 'cosine'"):
        load_config(repo / RECIPE, ["optimizer.schedule=cosin"])


def test_recipe_loads_and_overrides(repo):
    config = load_config(repo / RECIPE, ["seed=3", "optimizer.warmup=7"])
    assert config.seed == 3 and config.optimizer.warmup == 7
    assert config.model is not None
    assert config.model.num_layers >= 4 and config.model.num_kv_heads >= 4
    assert config.model.max_positions >= 1024


@pytest.mark.parametrize("name", bundled_recipes())
def test_bundled_recipes_are_whole(name, repo):
    """Every compression of theirs can be drawn and every optimizer made."""
    config = load_config(name, ["data.sources=[{task: recall}]"])
    assert config.stages
    sampler = Sampler(config.sampling, config.seed)
    assert (sampler.at(0) is None) == (not config.sampling.choices)
    make_optimizer(config.optimizer, config.steps)


def test_unknown_keys_name_the_nearest(repo):
    with pytest.raises(ValueError, match="'learning_rate'"):
        load_config(repo / RECIPE, ["optimizer.learning_rat=1.0"])
    with pytest.raises(ValueError, match="'num_layers'"):
        load_config(repo / RECIPE, ["model.num_layer=2"])
    with pytest.raises(
        ValueError, match="`stages.0.lengths.64` must be a number >= 0; got None"
    ):
        load_config(repo / RECIPE, ["stages.0.lengths={64: }"])
    with pytest.raises(ValueError, match="`trainable` must be a list; got 'norm'"):
        load_config(repo / RECIPE, ["trainable=norm"])
    with pytest.raises(ValueError, match="dotted.path=value"):
        load_config(repo / RECIPE, ["seed"])
    with pytest.raises(ValueError, match="'muon'"):
        make_optimizer(OptimizerConfig(name="muo"), 10)
