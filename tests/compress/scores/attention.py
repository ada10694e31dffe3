"""Scores from attention that tokens receive."""

from kvjax.scorers import H2O, TOVA, CriticalKV, ExpectedAttention, SnapKV
from tests import reference
from tests.compress.samples import Sample
from tests.compress.scores.cases import Case, plain, up_to_scale


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


SNAP = SnapKV(window=16)
CASES = {
    "snapkv": [
        Case(SNAP, plain("snapkv", window=16)),
        Case(SnapKV(window=8, kernel=7), plain("snapkv", window=8, kernel=7)),
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
}
