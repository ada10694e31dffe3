"""LongBench (and LongBench-E): F1, ROUGE-L, classes, paragraphs, counts, code.

Source: Bai et al. 2024, as kvpress scores its data (`evaluation/benchmarks/longbench`).
Deviations: class names that are part of the right one are all taken out, where the
published loop passes over every second of several; the likeness of code is `difflib`'s,
as it is published where no package for edit distances is installed.
The Chinese sets whose words a segmenter finds (`multifieldqa_zh`, `dureader`, `vcsum`)
have no metric here: choose `qa_f1_zh`, which is F1 of characters.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from kvjax.eval.metrics.rouge import rouge_l as rouge_of
from kvjax.eval.metrics.words import Asked, Metric, best, qa_f1, qa_f1_zh
from kvjax.messages import shown

CLASSES = "all_classes"
"""Key of `Turn.meta`: the names of all classes."""


def rouge_l(turn: Asked, reply: str) -> float:
    """F1 of ROUGE-L with the reference that fits best."""
    text = reply.lstrip()
    return best(turn, lambda one: rouge_of(text, one).f1)


def classification(turn: Asked, reply: str) -> float:
    """1 over the number of classes that the first line names, if the right is one."""
    classes = turn.meta.get(CLASSES)
    if not isinstance(classes, Sequence) or isinstance(classes, str) or not classes:
        raise ValueError(
            f"the metric 'classification' needs `{CLASSES}`, a list of the names of "
            f"all classes, in each row; got {shown(classes)}."
        )
    named = [one for one in classes if one in first_line(reply)]

    def score(right: str) -> float:
        apart = [one for one in named if one == right or one not in right]
        return 1 / len(apart) if right in apart else 0.0

    return best(turn, score)


def first_line(reply: str) -> str:
    """The first line that is not empty."""
    return reply.lstrip().split("\n")[0]


def line_qa_f1(turn: Asked, reply: str) -> float:
    """`qa_f1` of the first line."""
    return qa_f1(turn, first_line(reply))


def line_rouge_l(turn: Asked, reply: str) -> float:
    """`rouge_l` of the first line."""
    return rouge_l(turn, first_line(reply))


def count(turn: Asked, reply: str) -> float:
    """The share of the numbers in the reply that are the right one."""
    return best(turn, lambda one: _share(reply, one.strip()))


def retrieval(turn: Asked, reply: str) -> float:
    """The share of the numbers in the reply that are the right paragraph's."""
    return best(turn, lambda one: _share(reply, _paragraph(one, "Paragraph ")))


def retrieval_zh(turn: Asked, reply: str) -> float:
    """`retrieval` of Chinese paragraphs."""
    return best(turn, lambda one: _share(reply, _paragraph(one, "段落")))


def _paragraph(reference: str, word: str) -> str:
    found = re.search(rf"{word}(\d+)", reference)
    if not found:
        raise ValueError(
            f"the metric needs answers as {word + '12'!r}; got {shown(reference)}."
        )
    return found[1]


def _share(reply: str, right: str) -> float:
    numbers = re.findall(r"\d+", reply)
    return numbers.count(right) / len(numbers) if numbers else 0.0


_NO_CODE = ("`", "#", "//")


def code_similarity(turn: Asked, reply: str) -> float:
    """How alike the first line of code is: characters in common, in per cents."""
    lines = reply.lstrip().split("\n")
    plain = (line for line in lines if not any(mark in line for mark in _NO_CODE))
    line = next(plain, "")

    def score(one: str) -> float:
        alike = difflib.SequenceMatcher(None, line, one).ratio() if line else 0.0
        return round(100 * alike) / 100  # as published

    return best(turn, score)


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "qa_f1": qa_f1,
        "qa_f1_zh": qa_f1_zh,
        "line_qa_f1": line_qa_f1,
        "rouge_l": rouge_l,
        "line_rouge_l": line_rouge_l,
        "classification": classification,
        "retrieval": retrieval,
        "retrieval_zh": retrieval_zh,
        "count": count,
        "code_similarity": code_similarity,
    }
)

_TASKS = {
    "narrativeqa": "qa_f1",
    "qasper": "qa_f1",
    "multifieldqa_en": "qa_f1",
    "hotpotqa": "qa_f1",
    "2wikimqa": "qa_f1",
    "musique": "qa_f1",
    "gov_report": "rouge_l",
    "qmsum": "rouge_l",
    "multi_news": "rouge_l",
    "trec": "classification",
    "triviaqa": "line_qa_f1",
    "samsum": "line_rouge_l",
    "lsht": "classification",
    "passage_retrieval_en": "retrieval",
    "passage_count": "count",
    "passage_retrieval_zh": "retrieval_zh",
    "lcc": "code_similarity",
    "repobench-p": "code_similarity",
}
_SEGMENTED = ("multifieldqa_zh", "dureader", "vcsum")


def chosen(task: str) -> str | None:
    """The metric of a set of LongBench or LongBench-E (`qasper_e`); None of others.

    Raises:
        ValueError: it is Chinese, and its words are found by a segmenter.
    """
    name = re.sub(r"[-_]e$", "", task)
    if name in _SEGMENTED:
        raise ValueError(
            f"{name!r} is scored by words that a segmenter of Chinese finds, which is "
            "not here. `metric: qa_f1_zh` compares characters instead."
        )
    return _TASKS.get(name)
