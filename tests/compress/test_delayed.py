"""What a model gives up is seen for a while, or with a window of 1 not at all."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.prefills import Delayed
from tests import reference
from tests.compress.samples import draw, layer_spec
from tests.small import LATER, LENGTHS, batch, small_model

SPEC = layer_spec(4, 2, 16)
IMMEDIATE = {"prefill.window": 1, "evict.score.window": 1}


def seen_by(retention: np.ndarray, groups: int, window: int) -> np.ndarray:
    """`[H, n, n]`, from the words of the paper: gone `window` tokens later."""
    kv_heads, n = retention.shape
    mask = np.zeros((kv_heads * groups, n, n), bool)
    for head in range(len(mask)):
        for query in range(n):
            for key in range(query + 1):
                given_up = retention[head // groups, key] < 0
                mask[head, query, key] = not (given_up and query >= key + window)
    return mask


@pytest.mark.parametrize("window", [1, 2, 16])
def test_who_sees_what_was_given_up(window):
    sample = draw(0, SPEC, (50, 31), width=53)
    size = jnp.asarray(sample.lengths, jnp.int32)
    out, mass = Delayed(window=window).attend(sample.inputs, size, True)
    assert mass is not None
    for row, n in enumerate(sample.lengths):
        retention = np.asarray(sample.inputs.retention)[row, :, :n]
        mask = seen_by(retention, SPEC.groups, window)
        want = reference.attend(*sample.row(row), mask)
        np.testing.assert_allclose(out[row, :, :n], want, rtol=1e-5, atol=1e-5)
        # A token that is gone at once has weight in its own query alone.
        gone = np.repeat(retention < 0, SPEC.groups, axis=0)[:, : n - 1]
        received = np.asarray(mass)[row, :, : n - 1]
        if window == 1:
            assert received[gone].max() <= 1.0 < received[~gone].max()


@functools.lru_cache
def immediate() -> kvjax.Compression:
    return kvjax.compression("dms", **IMMEDIATE)


def test_immediate_eviction_in_both_forms():
    """Teacher-forced logits through the real cache are the parallel form's."""
    prompt, later, whole = batch()
    model, total = small_model(), LENGTHS + LATER
    first, cache = kvjax.prefill(model, prompt, LENGTHS, immediate(), max_new_tokens=64)
    logits, _ = kvjax.extend(model, cache, later, LATER)
    found = kvjax.simulate(model, whole, total, LENGTHS, immediate())
    delayed = kvjax.simulate(model, whole, total, LENGTHS, kvjax.compression("dms"))
    for row, n in enumerate(LENGTHS):
        np.testing.assert_allclose(found[row, n - 1], first[row], atol=1e-4)
        ours, m = found[row, n : total[row]], LATER[row]
        np.testing.assert_allclose(ours, logits[row, :m], atol=1e-4)
        assert np.abs(ours - delayed[row, n : total[row]]).max() > 2e-3


@pytest.mark.slow
def test_replies_under_immediate_eviction():
    """Greedy tokens are those that the parallel form chooses, fed the reply."""
    prompt, _, _ = batch()
    model, new = small_model(), 8
    out = kvjax.generate(model, prompt, LENGTHS, immediate(), max_new_tokens=new)
    whole = np.concatenate([prompt, np.zeros((len(prompt), new), np.int32)], axis=1)
    for row, n in enumerate(LENGTHS):
        whole[row, n : n + new] = out.tokens[row]
    logits = kvjax.simulate(model, whole, LENGTHS + new, LENGTHS, immediate())
    for row, n in enumerate(LENGTHS):
        chosen = np.asarray(logits)[row, n - 1 : n + new - 1].argmax(-1)
        np.testing.assert_array_equal(chosen, out.tokens[row])
