"""Every score ranks again and again while tokens are decoded."""

import numpy as np
import pytest

import kvjax
from kvjax.budgets import Uniform
from kvjax.compress.config import Compression, Eviction
from kvjax.schedules import EveryTokens
from tests.small import (
    LATER,
    LENGTHS,
    MANY,
    SCORES,
    assert_forms_agree,
    batch,
    small_model,
)


@pytest.mark.sweep(3, 6)
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
