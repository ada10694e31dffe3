"""KIVI with 1-bit values: the codec by an override, through all of the library."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kvjax
from kvjax.codecs import AffineArray
from kvjax.config import shortened
from tests.small import HEAD_DIM, LATER, LENGTHS, ROWS, batch, small_model

MODEL = small_model(layers=1)


def kivi(residual: int, bits: int = 1) -> kvjax.Compression:
    made = shortened(kvjax.compression("kivi_2bit", **{"store.values.bits": bits}))
    store = dataclasses.replace(made.store, residual=residual)
    return dataclasses.replace(made, store=store)


@pytest.mark.sweep(1, 2)
@pytest.mark.parametrize("residual", [0, 32])
def test_two_forms_agree(residual):
    prompt, later, whole = batch()
    total, c = LENGTHS + LATER, kivi(residual)
    first, cache = kvjax.prefill(MODEL, prompt, LENGTHS, c)
    real, _ = kvjax.extend(MODEL, cache, later, LATER)
    logits = kvjax.simulate(MODEL, whole, total, LENGTHS, c)
    for row, n in enumerate(LENGTHS):
        after = slice(n, total[row])
        np.testing.assert_allclose(logits[row, n - 1], first[row], atol=1e-4)
        np.testing.assert_allclose(
            logits[row, after], real[row, : LATER[row]], atol=1e-4
        )


def test_bytes_are_half_of_two_bits():
    prompt, _, _ = batch()
    held = {}
    for bits in (1, 2):
        _, cache = kvjax.prefill(MODEL, prompt, LENGTHS, kivi(0, bits))
        assert cache.nbytes == sum(x.nbytes for x in jax.tree.leaves(cache))
        held[bits] = cache
    values = held[1].layers[0].parts[0].values
    assert isinstance(values, AffineArray)
    assert values.codes.shape[-1] == HEAD_DIM // 8
    assert held[2].nbytes - held[1].nbytes == values.codes.size


@pytest.mark.slow
def test_generation_from_it():
    prompt, _, _ = batch()
    out = kvjax.generate(MODEL, prompt, LENGTHS, kivi(32), max_new_tokens=40)
    assert (np.asarray(out.lengths) == 40).all()
    logits, cache = kvjax.prefill(MODEL, prompt, LENGTHS, kivi(32))
    for step in range(2):
        token = jnp.argmax(logits, -1).astype(jnp.int32)[:, None]
        np.testing.assert_array_equal(out.tokens[:, step], token[:, 0])
        logits, cache = kvjax.extend(MODEL, cache, token)
        logits = logits[:, 0]


def test_gradient_passes_straight_through():
    """To the weights of the values, though a later token sees no value but by codes."""
    graph, params = nnx.split(MODEL)
    _, _, whole = batch()
    total = LENGTHS + 1

    def loss(params, c):
        model = nnx.merge(graph, params)
        logits = kvjax.simulate(model, whole[:, : total.max()], total, LENGTHS, c)
        last = logits[np.arange(ROWS), LENGTHS]
        return jnp.sum(jax.nn.log_softmax(last)[:, 0])

    def slope(c):
        grads = jax.grad(loss)(params, c)
        return np.asarray(grads.layers.attention.v.kernel[...])

    ours, plain = slope(kivi(0)), slope(kvjax.Compression())
    assert np.isfinite(ours).all()
    # The same way as without codes, but for what the codes change of the output.
    cosine = (ours * plain).sum() / np.linalg.norm(ours) / np.linalg.norm(plain)
    assert cosine > 0.7
