"""The gradient of a choice is the difference that the choice makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kvjax
from kvjax.attention import self_attention
from kvjax.compress.relaxed import relaxed_choice
from kvjax.models import Decoder
from kvjax.models.simulate import simulated
from kvjax.pallas_kernels.held import Earlier
from kvjax.schedules import EveryTokens
from kvjax.scorers import LagKV, Random, StreamingLLM
from tests.compress.samples import SPECS, draw
from tests.small import BUDGETED, LENGTHS, batch, preset, small_model


def attention(inputs, q, kept):
    """Attention of the queries over the kept keys before them, NumPy and float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, inputs.k, inputs.v))
    group = inputs.spec.groups
    k, v, kept = (np.repeat(x, group, axis=1) for x in (k, v, kept))
    logits = np.einsum("bhtd,bhsd->bhts", q, k) * inputs.spec.scale
    logits = np.where(kept[:, :, None], logits, -np.inf)
    peak = logits.max(-1, keepdims=True)
    weight = np.exp(logits - peak)
    total = weight.sum(-1, keepdims=True)
    out = np.einsum("bhts,bhsd->bhtd", weight / total, v)
    return out, (peak + np.log(total))[..., 0]


def test_a_token_counts_for_what_it_would_change():
    """The slope of `soft`, for the last token of a row, which is alone behind."""
    spec = SPECS["d16_g2"]
    inputs = draw(0, spec, (12,)).inputs
    rng = np.random.default_rng(0)
    kept = rng.random((1, spec.num_kv_heads, 12)) < 0.5
    kept[:, :, 11] = True  # it sees itself
    last = inputs.q[:, :, 11:]
    out, lse = attention(inputs, last, kept)
    behind = jnp.arange(12)[None] == 11

    def moved(soft):
        held = Earlier(behind=behind, kept=jnp.asarray(kept), soft=soft)
        return self_attention(inputs, earlier=held)[0][:, :, 11:]

    zero = jnp.zeros(kept.shape)
    np.testing.assert_allclose(moved(zero), out, atol=1e-5)
    slope = np.asarray(jax.jacrev(moved)(zero))
    group = spec.groups
    for head, token in np.ndindex(spec.num_kv_heads, 11):
        heads = slice(head * group, (head + 1) * group)
        if not kept[0, head, token]:
            more = kept.copy()
            more[0, head, token] = True
            want = (attention(inputs, last, more)[0] - out)[0, heads]
        else:  # what it weighs, times how far its value is from the output
            k, v = (
                np.asarray(x, np.float64)[0, head, token] for x in (inputs.k, inputs.v)
            )
            logit = np.asarray(last, np.float64)[0, heads] @ k * spec.scale
            weight = np.exp(logit - lse[0, heads])[..., None]
            want = weight * (v - out[0, heads])
        np.testing.assert_allclose(
            slope[0, heads, :, :, 0, head, token], want, atol=1e-5
        )
    assert not slope[..., 11].any()


def test_the_relaxed_choice_is_a_sigmoid_around_the_cut():
    scores = jnp.array([[[3.0, 1.0, jnp.inf, 2.0, -jnp.inf]]])
    kept = jnp.array([[[True, False, True, True, False]]])
    np.testing.assert_array_equal(
        relaxed_choice(kept, scores, 0.5), np.zeros((1, 1, 5))
    )
    slope = jax.grad(lambda s: relaxed_choice(kept, s, 0.5).sum())(scores)
    width = 0.5 * np.std([3.0, 1.0, 2.0])
    at = 1 / (1 + np.exp(-(np.array([3.0, 1.0, 2.0]) - 1.5) / width))
    want = at * (1 - at) / width
    np.testing.assert_allclose(slope[0, 0, [0, 1, 3]], want, rtol=1e-5)
    np.testing.assert_array_equal(slope[0, 0, [2, 4]], 0.0)


@pytest.mark.slow
@pytest.mark.sweep(1, 4)
@pytest.mark.parametrize("name", BUDGETED)
def test_the_forward_pass_does_not_change(name):
    """And the gradient is finite, and another one where there is a choice."""
    model, c = small_model(), preset(name)
    _, _, whole = batch()
    graph, params = nnx.split(model)
    at = jnp.arange(whole.shape[1])[None, :].repeat(len(whole), 0)

    def loss(params, choice):
        model: Decoder = nnx.merge(graph, params)
        points = jnp.asarray(LENGTHS)
        attend = simulated(model, points, jnp.asarray(whole), c, None, choice)
        found = model(jnp.asarray(whole), at, attend, trained=True)
        return jnp.sum(jnp.sin(found[:, -20:])), found

    (plain, one), slope = jax.value_and_grad(loss, has_aux=True)(params, 0.0)
    (again, two), other = jax.value_and_grad(loss, has_aux=True)(params, 0.5)
    np.testing.assert_allclose(one, two, atol=1e-5)
    np.testing.assert_allclose(plain, again, atol=1e-3)
    leaves = [np.asarray(x) for x in jax.tree.leaves(other)]
    assert all(np.isfinite(x).all() for x in leaves)
    moved = max(
        np.abs(x - np.asarray(y)).max()
        for x, y in zip(leaves, jax.tree.leaves(slope), strict=True)
    )
    assert (moved > 1e-6) == ranks_by_numbers(c)


def ranks_by_numbers(c: kvjax.Compression) -> bool:
    """Whether the choice follows numbers that weights can move, not places or ranks."""
    if c.evict is None or c.evict.values is not None:
        return False
    if isinstance(c.schedule, EveryTokens) or c.probes:
        return False
    return not isinstance(c.evict.score, Random | StreamingLLM | LagKV)
