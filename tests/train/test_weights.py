"""Which weights are trained, in which dtype, over how many batches."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kvjax
from kvjax.models.adapter_writing import fused, save_adapter
from kvjax.models.bundled import model_directory
from kvjax.models.config import Evictor
from kvjax.models.io import load
from kvjax.train.data import Mixture
from kvjax.train.objectives.objective import make_objective
from kvjax.train.recipe import DMSConfig, LoRAConfig, ObjectiveConfig, OptimizerConfig
from kvjax.train.run import run, runner
from kvjax.train.run.lora import merged, with_lora
from kvjax.train.run.model import adapter_base, weights_of
from kvjax.train.run.optimizer import make_optimizer
from kvjax.train.run.params import leaves_of, params_of
from kvjax.train.run.step import init_state, make_step
from tests.train.small import (
    DATA,
    SHAPE,
    STAGES,
    a_batch,
    model_of,
    predictions,
    recipe,
)

_MLP = ("gate", "up", "down")


def test_only_what_is_named_is_trained(tmp_path):
    fast = OptimizerConfig(learning_rate=0.05, warmup=1, decay=1)
    config = recipe(trainable=("*.attention.k.kernel", "norm.weight"), optimizer=fast)
    weights, params = weights_of(config)
    before = params_of(model_of())
    assert set(params) == {"norm.weight", "layers.attention.k.kernel"}
    assert set(params) | set(weights.fixed) == set(before)
    run(dataclasses.replace(config, log_every=1), tmp_path)
    model, _ = load(tmp_path / "model", "float32", tokenizer=False)
    for name, after in params_of(model).items():
        stored = before[name].astype("bfloat16").astype("float32")
        assert np.array_equal(after, stored) == (name not in params), name
    with pytest.raises(ValueError, match="matches no weight.*Did you mean"):
        weights_of(recipe(trainable=("layers.attention.kk.kernel",)))


def test_lora_starts_as_the_model_and_merges_into_it(tmp_path, monkeypatch):
    """Beside biases, too. A run whose export failed exports when it is run again."""
    shape = dataclasses.replace(SHAPE, family="qwen2", qkv_bias=True)
    lora = LoRAConfig(rank=4, modules=("q", "v", "down"))
    config = recipe(lora=lora, objective=ObjectiveConfig(distill=1.0), log_every=1)
    config = dataclasses.replace(config, model=shape)
    weights, params = weights_of(config)
    assert len(params) == 2 * 3
    assert {len(x) for x in params.values()} == {SHAPE.num_layers}
    assert not weights.guide, "the teacher has no weights of its own"
    batch = a_batch()
    start = predictions(weights.joined(params, weights.fixed), batch)
    np.testing.assert_array_equal(start, predictions(model_of(shape), batch))
    noise = np.random.default_rng(0)
    moved = {k: x + noise.normal(size=x.shape) * 0.1 for k, x in params.items()}
    moved = {k: jnp.asarray(x, jnp.float32) for k, x in moved.items()}
    tuned = weights.joined(moved, weights.fixed)
    found, plain = predictions(tuned, batch), merged(tuned)
    assert set(params_of(plain)) == set(params_of(model_of(shape)))
    np.testing.assert_allclose(predictions(plain, batch), found, atol=1e-4)
    assert float(jnp.abs(found - start).max()) > 1e-2
    with monkeypatch.context() as patch:
        patch.delattr(runner, "merged")
        with pytest.raises(NameError, match="merged"):
            run(config, tmp_path)
    assert not (tmp_path / "model").exists()
    assert int(run(config, tmp_path).step) == STAGES[0].steps
    load(tmp_path / "model", "float32", tokenizer=False)
    assert not (tmp_path / "adapter").exists()  # there is no checkpoint of its base
    with pytest.raises(ValueError, match="'gates'.*Did you mean 'gate'"):
        with_lora(model_of(), LoRAConfig(modules=("gates",)))


def test_the_adapter_of_a_run_is_its_model(tmp_path):
    """Beside it, with the model that training started from."""
    fast = OptimizerConfig(learning_rate=0.05, warmup=1, decay=1)
    lora = LoRAConfig(rank=4, alpha=6.0, modules=("q", "o", "up"))
    kvjax.save(model_of(), tmp_path / "base")
    config = dataclasses.replace(
        recipe(lora=lora, optimizer=fast, log_every=1),
        model=None,
        init=str(tmp_path / "base"),
    )
    run(config, tmp_path / "run")
    whole, own = (
        params_of(load(tmp_path / "run" / name, "float32", tokenizer=False)[0])
        for name in ("model", "adapter")
    )
    before = params_of(model_of())
    for name, found in own.items():
        # The model is rounded to bfloat16 behind the sum.
        np.testing.assert_allclose(found, whole[name], 0.01, 2e-3, err_msg=name)
        moved = float(jnp.abs(found - before[name]).max())
        trained = any(f".{one}.kernel" in name for one in lora.modules)
        assert (moved > 1e-2) == trained, (name, moved)
    phi = dataclasses.replace(SHAPE, family="phi3")
    assert fused(phi, ["attention.q", "attention.o", "mlp.up"]) == [
        "attention.q",
        "mlp.up",
    ]
    with pytest.raises(ValueError, match=r"'phi3' stores \['attention.q'\] within"):
        pair = (np.zeros((1, 2, 3)), np.zeros((1, 3, 2)))
        save_adapter(
            tmp_path / "other", phi, {"attention.q": pair}, base="b", alpha=1.0
        )


def test_an_adapter_is_of_a_checkpoint_and_has_all_that_was_trained(tmp_path):
    tuned = recipe(lora=LoRAConfig(rank=2, modules=("q",)))
    assert tuned.only_lora and not recipe().only_lora
    for more in (
        {"trainable": ("*norm.weight",)},
        {"evictor": Evictor()},
    ):
        assert not dataclasses.replace(tuned, **more).only_lora
    assert adapter_base(tuned) is None  # fresh weights
    wide = SHAPE.num_heads * SHAPE.head_dim
    pair = np.zeros((2, SHAPE.hidden_size, 2)), np.zeros((2, 2, wide))
    first = tmp_path / "first"
    save_adapter(first, SHAPE, {"attention.q": pair}, base="kvjax-tiny", alpha=1.0)
    bases = {
        init: adapter_base(dataclasses.replace(tuned, model=None, init=init))
        for init in ("kvjax-tiny", str(first))
    }
    assert bases == {"kvjax-tiny": model_directory("kvjax-tiny"), str(first): None}


def test_an_adapter_names_its_base_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").mkdir()
    wide = SHAPE.num_heads * SHAPE.head_dim
    a = np.zeros((SHAPE.num_layers, SHAPE.hidden_size, 2), np.float32)
    b = np.zeros((SHAPE.num_layers, 2, wide), np.float32)
    for given, said in (("~/base", str(tmp_path / "base")), ("a/b", "a/b")):
        out = tmp_path / "adapter"
        save_adapter(out, SHAPE, {"attention.q": (a, b)}, base=given, alpha=1.0)
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == said


def test_lora_beside_every_bias_is_the_merged_model():
    biased = dataclasses.replace(SHAPE, qkv_bias=True, o_bias=True, mlp_bias=True)
    model = model_of(biased)
    noise = np.random.default_rng(0)
    for owner, names in ((model.layers.attention, "qkvo"), (model.layers.mlp, _MLP)):
        for name in names:
            bias = getattr(owner, name).bias
            bias[...] = jnp.asarray(noise.normal(size=bias.shape), jnp.float32)
    every = LoRAConfig(rank=2, modules=(*"qkvo", *_MLP))
    tuned = with_lora(model, every)
    for owner, names in ((tuned.layers.attention, "qkvo"), (tuned.layers.mlp, _MLP)):
        for name in names:
            up = getattr(owner, name).lora_b
            up[...] = jnp.asarray(noise.normal(size=up.shape) * 0.1, jnp.float32)
    found, plain = predictions(tuned, a_batch()), merged(tuned)
    assert set(params_of(plain)) == set(params_of(model))
    np.testing.assert_allclose(predictions(plain, a_batch()), found, atol=1e-4)


def test_a_teacher_keeps_the_channels_that_a_neuron_borrows():
    config = recipe(
        evictor=Evictor(),
        dms=DMSConfig(),
        lora=LoRAConfig(rank=4),
        objective=ObjectiveConfig(distill=1.0),
    )
    weights, _ = weights_of(config)
    assert set(weights.guide) == {"layers.attention.q.kernel"}
    teacher = weights.guided(*weights.arrays)
    assert teacher is not None
    found = leaves_of(teacher)
    for name, wanted in leaves_of(model_of()).items():
        np.testing.assert_array_equal(found[name], wanted)


def test_accumulated_batches_are_one_update(tmp_path):
    config = recipe(
        optimizer=OptimizerConfig(name="adamw", accumulate=3, warmup=1, decay=1)
    )
    weights, params = weights_of(config)
    optimizer = make_optimizer(config.optimizer, 3)
    step = make_step(weights, make_objective(config), optimizer)
    state = init_state(params, optimizer)
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
    with pytest.raises(ValueError, match="compute` must be one of"):
        recipe(compute="float16")


@pytest.mark.sweep(1, 2)
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
