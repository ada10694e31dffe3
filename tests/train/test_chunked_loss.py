"""A loss whose logits are made in pieces is the loss of all of them at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.attention import causal_attention
from kvjax.models import Decoder
from kvjax.train.objectives.losses import answer_mean, next_token, token_scores
from kvjax.train.objectives.passes import pass_over
from kvjax.train.run.params import params_of, with_params
from tests.train.small import SHAPE, a_batch, model_of


@pytest.fixture(scope="module")
def teacher() -> Decoder:
    return Decoder(SHAPE, rngs=nnx.Rngs(1))


def scored(params, teacher: Decoder, most: int, attention=causal_attention):
    model, batch = with_params(model_of(), params), a_batch()
    hidden, wanted = (
        pass_over(one, batch.tokens, attention).hidden for one in (model, teacher)
    )
    tokens = token_scores(model, hidden, batch, teacher, wanted, most=most)
    loss, metrics = next_token(tokens, batch)
    assert tokens.apart is not None
    return loss + answer_mean(tokens.apart, batch), metrics


@pytest.mark.sweep(1, 3)
@pytest.mark.parametrize("pieces", [2, 7, 96])
def test_pieces_add_up(teacher, pieces):
    batch, params = a_batch(), params_of(model_of())
    every = batch.tokens.size * SHAPE.vocab_size
    grad = jax.jit(jax.value_and_grad(scored, has_aux=True), static_argnums=(1, 2))
    (wanted, metrics), slope = grad(params, teacher, every)
    (found, others), other = grad(params, teacher, every // pieces)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    for name, value in metrics.items():
        np.testing.assert_allclose(others[name], value, rtol=1e-6, err_msg=name)
    for name, value in slope.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-4, atol=1e-6)


def test_what_does_not_count_is_left_out(teacher):
    model, batch = model_of(), a_batch()
    hidden = pass_over(model, batch.tokens, causal_attention).hidden
    last = batch.tokens.shape[1] - 1
    few = jnp.zeros_like(batch.answers).at[:, last].set(True)
    batch = dataclasses.replace(batch, answers=few, weights=few.astype(jnp.float32))
    every = batch.tokens.size * SHAPE.vocab_size
    wanted = token_scores(model, hidden, batch, most=every).loss
    found = token_scores(model, hidden, batch, most=every // 2).loss
    np.testing.assert_allclose(found[:, -1], wanted[:, -1], rtol=1e-6)
    assert jnp.mean(found == 0.0) > 0.8


def test_no_array_holds_all_logits(teacher):
    """Neither forward nor backward: what is as large as the logits would show."""
    batch, params = a_batch(), params_of(model_of())
    every = batch.tokens.size * SHAPE.vocab_size

    def largest(most: int) -> int:  # without attention, whose logits are others
        grad = jax.grad(lambda p: scored(p, teacher, most, lambda x: x.q)[0])
        jaxpr = jax.make_jaxpr(grad)(params)
        return max(sizes(jaxpr.jaxpr))

    assert largest(every) >= every
    assert largest(every // 8) < every // 4


def sizes(jaxpr) -> list[int]:
    """Of all arrays over the vocabulary."""
    found = [0]
    for eqn in jaxpr.eqns:
        arrays = [x.aval for x in eqn.outvars if hasattr(x.aval, "shape")]
        found += [x.size for x in arrays if x.shape[-1:] == (SHAPE.vocab_size,)]
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += sizes(inner)
    return found
