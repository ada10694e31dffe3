"""Scores that look at positions, keys and values alone."""

from kvjax.scorers import CUR, KeyDiff, KNorm, LagKV, StreamingLLM
from tests.compress.scores.cases import Case, order_newest_first, plain, up_to_scale

CASES = {
    "streaming_llm": [
        Case(StreamingLLM(), plain("streaming_llm")),
        Case(StreamingLLM(n_sink=0), plain("streaming_llm", n_sink=0)),
    ],
    "knorm": [Case(KNorm(), plain("knorm"))],
    "keydiff": [Case(KeyDiff(), plain("keydiff"))],
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
WITHOUT = {
    "random": "its scores are a draw; see tests/compress/test_against_references.py",
    "retention": "the model says them; see tests/compress/test_against_references.py",
}
