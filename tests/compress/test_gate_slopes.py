"""Slopes of the loss behind real prompts along a gate on each of their tokens."""

import numpy as np
import pytest

import kvjax
from kvjax.scorers import Oracle
from tests.compress.probing import (
    FAMILIES,
    KV_HEADS,
    LAYERS,
    LENGTHS,
    V,
    found,
    model_of,
    prompts,
    transformer,
)
from tests.reference import probes


def continued() -> tuple[np.ndarray, np.ndarray]:
    """Rows that go on behind the prompts, one of which does not, and their lengths."""
    rng = np.random.default_rng(5)
    whole = rng.integers(0, V, (3, 30)).astype(np.int32)
    return whole, np.array([30, 13, 12])


def test_slopes_behind_real_prompts(tolerance):
    whole, total = continued()
    ours = np.asarray(kvjax.gate_slopes(model_of(), whole, total, LENGTHS))
    assert ours.shape == (LAYERS, 3, KV_HEADS, 30)
    for row, n in enumerate(LENGTHS):
        assert not ours[:, row, :, n:].any()
        if total[row] == n:
            assert not ours[:, row].any()
            continue
        ones, tokens = np.ones((LAYERS, KV_HEADS, n)), whole[row, : total[row]]
        want = probes.gate_slopes(transformer(model_of()), tokens, ones)
        near = tolerance("float32")
        np.testing.assert_allclose(ours[:, row, :, :n], want, **near)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_ways_to_a_slope_agree(family, tolerance):
    """A replay of the whole prompt is a continuation like any other."""
    model, prompt = model_of(**FAMILIES[family]), prompts()
    twice = np.zeros((3, 2 * LENGTHS.max()), np.int32)
    for row, n in enumerate(LENGTHS):
        twice[row, : 2 * n] = np.tile(prompt[row, :n], 2)
    slopes = np.asarray(kvjax.gate_slopes(model, twice, 2 * LENGTHS, LENGTHS))
    rises = found(model, Oracle(chunk=64))
    # The first token of a continuation counts, but no gate reaches it.
    counts = LENGTHS[:, None, None].astype(float)
    width = LENGTHS.max()
    near = tolerance("float32")
    np.testing.assert_allclose(
        rises[..., :width] * (counts - 1), -slopes[..., :width] * counts, **near
    )


def ranks(x: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(x.ravel()))


def test_slopes_foretell_what_removing_a_token_does():
    """To first order: where no token has much of the attention."""
    model, n, whole = model_of(0.1), 21, continued()[0][:1]
    theirs = transformer(model)
    slopes = np.asarray(kvjax.gate_slopes(model, whole, None, np.array([n])))
    rises = np.zeros((LAYERS, KV_HEADS, n))
    full = probes.mean_nll(theirs, whole[0], n)
    for index in np.ndindex(rises.shape):
        gates = np.ones(rises.shape)
        gates[index] = 0.0
        rises[index] = probes.mean_nll(theirs, whole[0], n, gates) - full
    said = -slopes[:, 0, :, :n]
    large = np.abs(rises) > np.median(np.abs(rises)) / 4
    assert (np.sign(said) == np.sign(rises))[large].all()
    assert np.corrcoef(ranks(said), ranks(rises))[0, 1] > 0.99
    size = np.abs(rises).mean()  # and it is of the size that it has
    assert np.abs(said - rises).mean() < 0.2 * size


def test_slopes_need_a_point_inside_each_row():
    whole, total = continued()
    with pytest.raises(ValueError, match="must not be above `lengths`; row 1"):
        kvjax.gate_slopes(model_of(), whole, total, LENGTHS + 1)
