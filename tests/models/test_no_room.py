"""A cache with no room for later tokens: what asks for none works on it."""

import jax
import numpy as np
import pytest

import kvjax
from kvjax.models.generation import generate_from
from tests.small import batch, one_per_structure, preset, small_model

TOKENS, LENGTHS = batch()[0][:2], np.array([112, 75], np.int32)
ONE, NONE = np.ones((2, 1), np.int32), np.zeros(2, np.int32)


@one_per_structure(1, 8)
def test_calls_that_add_nothing(name):
    """They failed in shapes of zero slots, for most compressions."""
    model = small_model()
    logits, cache = kvjax.prefill(
        model, TOKENS, LENGTHS, preset(name), max_new_tokens=0
    )
    made = generate_from(model, cache, logits, max_new_tokens=1)
    np.testing.assert_array_equal(made.tokens[:, 0], np.argmax(logits, axis=-1))
    np.testing.assert_array_equal(made.cache.length, LENGTHS)
    assert made.cache.nbytes == cache.nbytes
    for later in (ONE, np.repeat(ONE, 2, axis=1)):
        _, same = kvjax.extend(model, cache, later, NONE)
        jax.tree.map(np.testing.assert_array_equal, same, cache)
    if not cache.room == 0:
        return
    with pytest.raises(ValueError, match="room for 0"):
        kvjax.extend(model, cache, ONE)
    extend = jax.jit(lambda cache, n: kvjax.extend(model, cache, ONE, n)[0])
    out = np.asarray(extend(cache, np.array([1, 0], np.int32)))
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


def test_a_prefix_needs_no_room():
    model, prompts = small_model(), TOKENS[:, 6:70]
    ends = []
    for room in (0, 4):
        _, front = kvjax.prefill(model, TOKENS[:1, :6], max_new_tokens=room)
        first, cache = kvjax.prefill(model, prompts, prefix=front, max_new_tokens=1)
        ends.append((first, kvjax.extend(model, cache, ONE)[0]))
    for ours, theirs in zip(*ends, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
