"""LongBench v2: the letter of a choice, in the phrase that the question asks for.

Source: Bai et al. 2025, as kvpress scores its data (`evaluation/benchmarks/
longbenchv2`). Deviations: a letter without brackets must end there, so that `The
correct answer is Dickens` is no D; scores are in [0, 1].
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

from kvjax.eval.metrics.words import Asked, Metric, best

PHRASE = "The correct answer is "


def correct_answer_letter(turn: Asked, reply: str) -> float:
    """1 if the reply says `The correct answer is (B)`, or without the brackets."""
    text = reply.replace("*", "")

    def score(letter: str) -> float:
        letter = re.escape(letter.strip())
        return float(bool(re.search(rf"{PHRASE}(\({letter}\)|{letter}\b)", text)))

    return best(turn, score)


METRICS: Mapping[str, Metric] = MappingProxyType(
    {"correct_answer_letter": correct_answer_letter}
)


def chosen(task: str) -> str | None:
    """The metric of all its rows, which name no task."""
    del task
    return "correct_answer_letter"
