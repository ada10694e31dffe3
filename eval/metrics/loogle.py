"""LooGLE: recall of ROUGE, BLEU of one order, masked names.

Source: Li et al. 2024, as kvpress scores its data (`evaluation/benchmarks/loogle`).
There each answer has several scores; one is taken here (`rouge_l_recall` for questions
and summaries, `cloze_exact` for clozes), the others are there by name. METEOR needs
WordNet and the BERT score a model: they are left out. Deviations: replies are read as
JSON or as a Python literal and never run (the published scorer uses `eval`); the share
of a cloze is averaged over rows, not over masks; more than one reference may be given.
"""

import ast
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from kvjax.eval.metrics.rouge import rouge_l, rouge_n
from kvjax.eval.metrics.words import Asked, Metric, best
from kvjax.messages import shown


def rouge_1_recall(turn: Asked, reply: str) -> float:
    """Share of the reference's words that the reply has."""
    return best(turn, lambda one: rouge_n(reply, one, 1).recall)


def rouge_2_recall(turn: Asked, reply: str) -> float:
    """Share of the reference's pairs of words that the reply has."""
    return best(turn, lambda one: rouge_n(reply, one, 2).recall)


def rouge_l_recall(turn: Asked, reply: str) -> float:
    """Recall of ROUGE-L."""
    return best(turn, lambda one: rouge_l(reply, one).recall)


def bleu_1(turn: Asked, reply: str) -> float:
    """Precision of words, with the penalty of brevity."""
    return best(turn, lambda one: _bleu(one.split(), reply.split(), 1))


def bleu_4(turn: Asked, reply: str) -> float:
    """Precision of four words in a row alone, with the penalty of brevity."""
    return best(turn, lambda one: _bleu(one.split(), reply.split(), 4))


def _bleu(reference: list[str], words: list[str], order: int) -> float:
    found, wanted = (
        Counter(tuple(side[i : i + order]) for i in range(len(side) - order + 1))
        for side in (words, reference)
    )
    if not found:
        return 0.0
    share = sum((found & wanted).values()) / sum(found.values())
    short = len(words) <= len(reference)
    return share * (math.exp(1 - len(reference) / len(words)) if short else 1.0)


def cloze_exact(turn: Asked, reply: str) -> float:
    """Share of the masks whose name is right."""
    wanted, said = _reference(turn), _mapping(reply) or {}
    return sum(said.get(mask) == name for mask, name in wanted.items()) / len(wanted)


def cloze_partial(turn: Asked, reply: str) -> float:
    """Share of the masks of whose name a word is right."""
    wanted, said = _reference(turn), _mapping(reply) or {}
    common = (
        set(str(name).split()) & set(str(said.get(mask, "")).split())
        for mask, name in wanted.items()
    )
    return sum(map(bool, common)) / len(wanted)


def _reference(turn: Asked) -> dict[str, Any]:
    text = (turn.answers or (turn.answer,))[0]
    found = _mapping(text)
    if not found:
        raise ValueError(
            "a cloze needs an answer that maps masks to names, {'<mask-0>': 'Bob'}; "
            f"got {shown(text)}."
        )
    return found


MOST = 20_000
"""Characters of a reply that are read as a mapping."""


def _mapping(text: str) -> dict[str, Any] | None:
    """A mapping from texts, of JSON or Python, as the whole text; nothing is run."""
    text = text.strip()
    if len(text) > MOST or not re.match(r"\{.*\}$", text, re.DOTALL):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of `\d`, which is no escape
                found = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        if isinstance(found, dict):
            return {str(key): value for key, value in found.items()}
    return None


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "rouge_1_recall": rouge_1_recall,
        "rouge_2_recall": rouge_2_recall,
        "rouge_l_recall": rouge_l_recall,
        "bleu_1": bleu_1,
        "bleu_4": bleu_4,
        "cloze_exact": cloze_exact,
        "cloze_partial": cloze_partial,
    }
)

_TASKS = {
    "shortdep_qa": "rouge_l_recall",
    "longdep_qa": "rouge_l_recall",
    "longdep_summarization": "rouge_l_recall",
    "shortdep_cloze": "cloze_exact",
}


def chosen(task: str) -> str | None:
    """The metric of a task of LooGLE; None of others."""
    return _TASKS.get(task)
