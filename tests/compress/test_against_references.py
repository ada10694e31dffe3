"""Every registered scorer equals its NumPy reference on the live part of each row."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.prefills import Dense
from kvjax.scorers import (
    CUR,
    H2O,
    SCORERS,
    TOVA,
    AbstractScorer,
    CriticalKV,
    ExpectedAttention,
    KeyDiff,
    KNorm,
    LagKV,
    Random,
    SnapKV,
    StreamingLLM,
)
from kvjax.scorers import _values as values_module
from tests import reference
from tests.compress.samples import Sample, draw, layer_spec

LENGTHS = (96, 61, 30)
"""The last row is too short for LagKV blocks of 16, and for no window."""
COUNTS = (48, 20, 17)
SHAPES = {"d16_g2": (4, 2, 16), "d32_g3": (6, 2, 32), "d16_mqa": (4, 1, 16)}


def values(ours: np.ndarray, theirs: np.ndarray) -> None:
    """The same numbers, the same tokens protected."""
    np.testing.assert_array_equal(np.isposinf(ours), np.isposinf(theirs))
    finite = np.isfinite(theirs)
    np.testing.assert_allclose(ours[finite], theirs[finite], rtol=1e-4)


def up_to_scale(ours: np.ndarray, theirs: np.ndarray) -> None:
    """As `values`, but each head may have a positive factor of its own."""
    for mine, other in zip(ours, theirs, strict=True):
        values(
            mine / mine[np.isfinite(mine)].sum(),
            other / other[np.isfinite(other)].sum(),
        )


def order_newest_first(ours: np.ndarray, theirs: np.ndarray) -> None:
    """The same ranking, if of the reference's protected tokens the newest comes first.

    The sinks, which both protect, aside.
    """
    sinks = np.isposinf(ours)
    assert np.isposinf(theirs[sinks]).all()
    index = np.arange(theirs.shape[-1])
    theirs = np.where(np.isposinf(theirs), 2.0 + index, theirs)
    for mine, other, sink in zip(ours, theirs, sinks, strict=True):
        np.testing.assert_array_equal(
            np.argsort(-mine[~sink], kind="stable"),
            np.argsort(-other[~sink], kind="stable"),
        )


@dataclasses.dataclass(frozen=True)
class Case:
    """A scorer, the reference call that it follows, and how the two compare."""

    scorer: AbstractScorer
    expected: Callable[[Sample, int, int], np.ndarray]
    compare: Callable[[np.ndarray, np.ndarray], None] = values


def plain(name: str, **options):
    """The reference `score_<name>` with options."""
    function = getattr(reference, f"score_{name}")
    return lambda sample, row, n: function(*sample.row(row), **options)


def expected_attention(**options):
    """ExpectedAttention of a row."""
    score = reference.score_expected_attention
    return lambda sample, row, n: score(
        *sample.row(row), inv_freq=sample.inv_freq, **options
    )


def critical(base, **options):
    """CriticalKV over a base score, for a budget of `n` tokens."""

    def score(sample: Sample, row: int, n: int):
        scores, (_, _, v) = base(sample, row, n), sample.row(row)
        return reference.score_criticalkv(scores, v, sample.w_o, n, **options)

    return score


SNAP, SNAP_NARROW = SnapKV(window=16), SnapKV(window=8, kernel=7)
REFERENCES: dict[str, list[Case]] = {
    "streaming_llm": [
        Case(StreamingLLM(), plain("streaming_llm")),
        Case(StreamingLLM(n_sink=0), plain("streaming_llm", n_sink=0)),
    ],
    "knorm": [Case(KNorm(), plain("knorm"))],
    "keydiff": [Case(KeyDiff(), plain("keydiff"))],
    "snapkv": [
        Case(SNAP, plain("snapkv", window=16)),
        Case(SNAP_NARROW, plain("snapkv", window=8, kernel=7)),
        Case(SnapKV(window=1, kernel=1), plain("snapkv", window=1, kernel=1)),
    ],
    "tova": [Case(TOVA(), plain("tova"))],
    "h2o": [
        Case(H2O(), plain("observed_attention")),
        # The reference sums over a query group, we average.
        Case(H2O(normalize=False, recent=6), plain("h2o", recent=6), up_to_scale),
        Case(H2O(normalize=False), plain("h2o"), up_to_scale),
    ],
    "expected_attention": [
        Case(ExpectedAttention(), expected_attention()),
        Case(
            ExpectedAttention(n_future=16, n_sink=2, epsilon=0.01),
            expected_attention(n_future=16, n_sink=2, epsilon=0.01),
        ),
        Case(
            ExpectedAttention(use_covariance=False, use_vnorm=False),
            expected_attention(use_covariance=False, use_vnorm=False),
        ),
    ],
    "critical_kv": [
        Case(CriticalKV(base=SNAP), critical(plain("snapkv", window=16))),
        Case(CriticalKV(base=TOVA()), critical(plain("tova"))),
        Case(
            CriticalKV(base=H2O(), epsilon=0.01, first_stage=0.25),
            critical(plain("observed_attention"), epsilon=0.01, first_stage=0.25),
        ),
    ],
    # Ours replaces "protected" behind the sinks by "the newest first".
    "lagkv": [
        Case(LagKV(lag=16), plain("lagkv", lag=16), order_newest_first),
        Case(
            LagKV(lag=12, n_sink=0),
            plain("lagkv", lag=12, n_sink=0),
            order_newest_first,
        ),
    ],
    # Scores are not normalised over the sequence: one factor per head.
    "cur": [
        Case(CUR(), plain("cur"), up_to_scale),
        Case(CUR(n_sink=0, block=7), plain("cur", num_sinks=0, window=7), up_to_scale),
    ],
}
WITHOUT_REFERENCE = {
    "random": "its scores are a draw; see the tests at the end",
    "retention": "the model says them; see the test at the end",
}


def scores_of(scorer: AbstractScorer, sample: Sample, counts) -> np.ndarray:
    """Scores `[B, K, S]` as the library computes them."""
    lengths = jnp.asarray(sample.lengths, jnp.int32)
    mass = None
    if scorer.needs_column_mass:
        _, mass = Dense().attend(sample.inputs, lengths, True)
    seen = scorer.observe(sample.inputs, lengths, mass)
    return np.asarray(scorer.rank(seen, jnp.asarray(counts, jnp.int32), lengths))


def test_every_scorer_has_a_reference_or_a_reason():
    assert set(REFERENCES) | set(WITHOUT_REFERENCE) == set(SCORERS)
    assert not set(REFERENCES) & set(WITHOUT_REFERENCE)
    for name, cases in REFERENCES.items():
        assert {type(case.scorer) for case in cases} == {SCORERS[name]}


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
    scorer = CriticalKV(base=SNAP)
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
