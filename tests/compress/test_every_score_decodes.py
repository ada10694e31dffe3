"""Every score ranks again and again while tokens are decoded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.budgets import Uniform
from kvjax.cache import LayerCache, Shared, Slots
from kvjax.codecs import PlainArray
from kvjax.compress.config import Compression, Eviction
from kvjax.schedules import EveryTokens
from kvjax.scorers import KNorm, SnapKV
from tests.compress.samples import (
    compressed,
    decode_inputs,
    draw,
    layer_spec,
    prefix,
)
from tests.small import (
    LATER,
    LENGTHS,
    MANY,
    SCORES,
    assert_forms_agree,
    batch,
    small_model,
)

ATTEND = jax.jit(LayerCache.attend)


@pytest.mark.sweep(1, 3)
@pytest.mark.parametrize("name", SCORES)
def test_decodes(name):
    """Both forms agree, and each row is what it is alone."""
    model, (prompt, later, _) = small_model(vocab=MANY), batch(MANY)
    evict = Eviction(score=SCORES[name], budget=Uniform(keep=0.4))
    c = Compression(evict=evict, schedule=EveryTokens(interval=4))
    assert_forms_agree(model, c)
    _, cache = kvjax.prefill(model, prompt, LENGTHS, c)
    logits, cache = kvjax.extend(model, cache, later, LATER)
    for row, (n, m) in enumerate(zip(LENGTHS, LATER, strict=True)):
        _, alone = kvjax.prefill(model, prompt[row : row + 1, :n], None, c)
        theirs, alone = kvjax.extend(model, alone, later[row : row + 1, :m])
        np.testing.assert_allclose(logits[row, :m], theirs[0], atol=1e-4)
        for layer in range(cache.num_layers):
            ours, one = cache.kept_positions(layer)[row], alone.kept_positions(layer)[0]
            assert len(ours[0]) < n
            for held, want in zip(ours, one, strict=True):
                np.testing.assert_array_equal(held, want)


def test_what_queries_pay_to_a_prefix_is_remembered():
    """So that what they pay to the tokens held is the share that it was."""
    spec, steps, prompts = layer_spec(4, 2, 16), 11, np.array([40, 29])
    whole, front = draw(9, spec, tuple(prompts + steps)), draw(10, spec, (13,)).inputs
    logits = jnp.einsum(
        "BKGTD,KSD->BKGTS", whole.inputs.q.reshape(2, 2, 2, -1, 16), front.k[0]
    )
    paid = jax.nn.logsumexp(logits * spec.scale, axis=-1).reshape(2, 4, -1)
    sample = prefix(whole, prompts)
    inputs = dataclasses.replace(sample.inputs, elsewhere=paid[:, :, : prompts.max()])
    evict = Eviction(score=SnapKV(window=6), budget=Uniform(slots=16))
    c = Compression(evict=evict, schedule=EveryTokens(interval=4))
    cache = compressed(dataclasses.replace(sample, inputs=inputs), c)
    part = Slots(
        keys=PlainArray(data=front.k),
        values=PlainArray(data=front.v),
        positions=jnp.zeros(front.k.shape[:3], jnp.int32),
    )
    shared = (Shared(part=part, rows=2),)
    for step in range(steps):
        _, cache = ATTEND(cache, decode_inputs(whole, prompts, step), None, shared)
        assert cache.tracking is not None
        for row, n in enumerate(prompts + step + 1):
            ours = cache.tracking.row.elsewhere[row]
            np.testing.assert_allclose(ours, paid[row, :, n - 6 : n], rtol=1e-5)


def test_what_no_query_sees_again_goes():
    """However high its score; the short rows' bodies are not full at first."""
    spec, steps, prompts = layer_spec(4, 2, 16, window=16), 24, np.array([40, 9])
    whole = draw(11, spec, tuple(prompts + steps))
    evict = Eviction(score=KNorm(), budget=Uniform(slots=12))
    c = Compression(evict=evict, schedule=EveryTokens(interval=4))
    cache = compressed(prefix(whole, prompts), c)
    for step in range(steps):
        _, cache = ATTEND(cache, decode_inputs(whole, prompts, step))
        if (step + 1) % 4:
            continue
        for row, n in enumerate(prompts + step + 1):
            for held in cache.parts[0].live_positions()[row]:
                assert len(held) == min(12, n)
                assert held.min() >= n - spec.window
