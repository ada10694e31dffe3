"""Every registered scorer equals its NumPy reference on the live part of each row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.compress.observe import remember
from kvjax.prefills import Dense
from kvjax.scorers import (
    SCORERS,
    AbstractScorer,
    CriticalKV,
    KNorm,
    Random,
    SnapKV,
)
from kvjax.scorers import _values as values_module
from tests.compress.samples import Sample, draw, layer_spec
from tests.compress.scores import REFERENCES, WITHOUT_REFERENCE

LENGTHS = (96, 61, 30)
"""The last row is too short for LagKV blocks of 16, and for no window."""
COUNTS = (48, 20, 17)
SHAPES = {"d16_g2": (4, 2, 16), "d32_g3": (6, 2, 32), "d16_mqa": (4, 1, 16)}


def scores_of(scorer: AbstractScorer, sample: Sample, counts) -> np.ndarray:
    """Scores `[B, K, S]` as the library computes them."""

    @jax.jit
    def scores(inputs, lengths, counts):
        mass = Dense().attend(inputs, lengths, True)[1] if scorer.needs_mass else None
        held = inputs.held(lengths)
        return scorer.score(remember(scorer, None, inputs, held, mass), held, counts)

    given = (jnp.asarray(x, jnp.int32) for x in (sample.lengths, counts))
    return np.asarray(scores(sample.inputs, *given))


def test_every_scorer_has_a_reference_or_a_reason():
    assert set(REFERENCES) | set(WITHOUT_REFERENCE) == set(SCORERS)
    assert not set(REFERENCES) & set(WITHOUT_REFERENCE)
    for name, cases in REFERENCES.items():
        assert {type(case.scorer) for case in cases} == {SCORERS[name]}


@pytest.mark.sweep(16, 30)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", REFERENCES)
def test_scores(name, shape):
    sample = draw(3, layer_spec(*SHAPES[shape]), LENGTHS, width=104)
    for case in REFERENCES[name]:
        ours = scores_of(case.scorer, sample, COUNTS)
        for row, (length, n) in enumerate(zip(LENGTHS, COUNTS, strict=True)):
            case.compare(ours[row, :, :length], case.expected(sample, row, n))


@pytest.mark.parametrize("first_stage", [0.0, 1.0])
def test_critical_kv_floor(first_stage):
    """The first stage is never empty, as in kvpress; the reference has no floor."""
    scorer = CriticalKV(base=KNorm(), first_stage=first_stage)
    sample = draw(4, layer_spec(4, 2, 16), LENGTHS)
    protected = np.isposinf(scores_of(scorer, sample, COUNTS)).sum(-1)
    for row, n in enumerate(COUNTS):
        assert (protected[row] == max(1, int(first_stage * n))).all()


def test_critical_kv_in_chunks(monkeypatch):
    """Projected norms do not depend on how many tokens are projected at once."""
    sample = draw(5, layer_spec(4, 2, 16), LENGTHS)
    scorer = CriticalKV(base=SnapKV(window=16))
    whole = scores_of(scorer, sample, COUNTS)
    monkeypatch.setattr(values_module, "LOGITS_BUDGET", 7 * 3 * 4 * 24)
    chunked = scores_of(scorer, sample, COUNTS)
    for row, n in enumerate(LENGTHS):
        np.testing.assert_allclose(chunked[row, :, :n], whole[row, :, :n], rtol=1e-5)


def test_random_is_a_uniform_draw_per_head_and_row():
    sample = draw(6, layer_spec(4, 2, 16), (96, 96, 61))
    ours = scores_of(Random(), sample, COUNTS)
    assert ((ours >= 0) & (ours < 1)).all() and abs(ours.mean() - 0.5) < 0.05
    np.testing.assert_array_equal(ours[0], ours[1])  # same length, same draw
    assert abs(np.corrcoef(ours[0, 0], ours[0, 1])[0, 1]) < 0.3
    assert (scores_of(Random(seed=1), sample, COUNTS) != ours).mean() > 0.99


def test_retention_is_what_the_model_says():
    sample = draw(3, layer_spec(4, 2, 16), LENGTHS, width=104)
    scores = scores_of(SCORERS["retention"](window=5), sample, COUNTS)  # type: ignore
    said = np.asarray(sample.inputs.retention)
    for row, length in enumerate(LENGTHS):
        assert np.isposinf(scores[row, :, length - 5 : length]).all()
        np.testing.assert_array_equal(
            scores[row, :, : length - 5], said[row, :, : length - 5]
        )
