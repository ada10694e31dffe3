"""The decoder under NNX's two modes and JAX's transformations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.models import Decoder, DecoderConfig, causal_attention
from kvjax.rope import Rope
from kvjax.types import LayerInputs, padded_positions

from .samples import CONFIGS, sample

TOKENS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6) + 3
LENGTHS = jnp.array([6, 4], jnp.int32)
POSITIONS = padded_positions(LENGTHS, 6)


def forward(graphdef, params, *, remat=False):
    model = nnx.merge(graphdef, params)
    hidden = model(TOKENS, POSITIONS, causal_attention, remat=remat)
    return model.logits(hidden)


@pytest.fixture(params=["graph", "tree"])
def mode(request):
    if request.param == "graph":
        yield request.param
        return
    nnx.set_graph_mode(False)
    nnx.set_graph_updates(False)
    yield request.param
    nnx.set_graph_mode(True)
    nnx.set_graph_updates(True)


@pytest.mark.sweep(2, 4)
@pytest.mark.parametrize("family", ["gemma3_text", "llama"])
def test_split_merge_jit_and_grad(mode, family):
    del mode
    graphdef, params = nnx.split(sample(family))

    def loss(params, remat):
        out = jnp.where(POSITIONS[..., None] >= 0, forward(graphdef, params), 0.0)
        if remat:
            out = forward(graphdef, params, remat=True)
            out = jnp.where(POSITIONS[..., None] >= 0, out, 0.0)
        return jnp.mean(out**2)

    plain = jax.jit(jax.grad(loss), static_argnums=1)(params, False)
    again = jax.jit(jax.grad(loss), static_argnums=1)(params, True)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        assert np.isfinite(a).all() and np.abs(a).max() > 0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8)


def test_attention_is_called_once_per_layer_with_its_spec():
    config = CONFIGS["gemma3_text"]
    seen: list[LayerInputs] = []

    def attention(inputs: LayerInputs):
        seen.append(inputs)
        return causal_attention(inputs)

    hidden = sample("gemma3_text")(TOKENS, POSITIONS, attention)
    assert tuple(inputs.spec for inputs in seen) == config.layers
    assert seen[0].q.shape == (2, 4, 6, 4) and seen[0].k.shape == (2, 2, 6, 4)
    assert seen[0].o_proj.shape == (4, 4, 16) and hidden.shape == (2, 6, 16)


def test_rows_are_independent():
    model = sample("qwen3")
    both = model.logits(model(TOKENS, POSITIONS, causal_attention))
    alone = model.logits(model(TOKENS[1:, :4], POSITIONS[1:, :4], causal_attention))
    np.testing.assert_allclose(both[1, :4], alone[0], rtol=1e-5, atol=1e-6)


@pytest.mark.sweep(1, 2)
@pytest.mark.parametrize("family", ["gemma3_text", "llama"])
def test_one_token_equals_the_same_token_among_others(family):
    # One 16-bit row takes another path on a CPU.
    model = sample(family, jnp.bfloat16)
    tokens = jnp.full((4, 1), 7, jnp.int32)
    positions = jnp.zeros((4, 1), jnp.int32)
    many = model.logits(model(tokens, positions, causal_attention))
    one = model.logits(model(tokens[:1], positions[:1], causal_attention))
    assert one.shape == (1, 1, 40)
    np.testing.assert_allclose(one[0], many[0], rtol=2e-2, atol=2e-3)


def test_parameters_set_the_dtype_and_logits_are_float32():
    model = sample("gemma3_text", jnp.bfloat16)
    hidden = model(TOKENS, POSITIONS, causal_attention)
    assert model.dtype == hidden.dtype == jnp.bfloat16
    assert model.logits(hidden).dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {hidden.dtype}


def test_tied_embeddings_get_both_gradients():
    model = sample("qwen3")
    assert model.head is None
    graphdef, params = nnx.split(model)
    grad = jax.grad(lambda p: jnp.sum(forward(graphdef, p) ** 2))(params)
    unused = jnp.ones(40, bool).at[TOKENS.ravel()].set(False)
    rows = np.abs(nnx.merge(graphdef, grad).embedding[...]).max(-1)
    assert (rows[np.asarray(unused)] > 0).all(), "the head gives every row a gradient"


def test_soft_caps_bound_logits():
    config = dataclasses.replace(CONFIGS["llama"], final_softcap=0.01)
    model = Decoder(config, rngs=nnx.Rngs(0))
    logits = model.logits(model(TOKENS, POSITIONS, causal_attention))
    assert 0.005 < np.abs(logits).max() <= 0.01


def test_config_is_hashable_and_builds_layers_once():
    config = CONFIGS["gemma3_text"]
    assert hash(config) == hash(dataclasses.replace(config))
    assert config.layers is config.layers
    assert [spec.window for spec in config.layers] == [8, None, 8]
    assert config.layers[0].rope != config.layers[1].rope


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_kv_heads": 3}, "must divide"),
        ({"num_layers": 0}, "num_layers"),
        ({"windows": (8,)}, "per layer"),
        ({"windows": (0, 0, 0)}, "windows.0` must be an integer >= 1"),
        ({"activation": "gelo"}, "Did you mean 'gelu'"),
        ({"rope": Rope(head_dim=8)}, "head_dim"),
    ],
)
def test_config_rejects(fields, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(CONFIGS["llama"], **fields)


def test_fresh_weights_follow_the_configuration():
    config = DecoderConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=64,
        num_layers=1,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        rope=Rope(head_dim=16),
        init_std=0.1,
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    assert abs(float(jnp.std(model.embedding[...])) - 0.1) < 0.01
    assert abs(float(jnp.std(model.layers.mlp.up.kernel[...])) - 0.1) < 0.01
