"""RULER: which of the wanted texts occur in the reply.

Source: Hsieh et al. 2024, as kvpress scores its data (`evaluation/benchmarks/ruler`).
Deviations: none; scores are in [0, 1].
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

from kvjax.eval.metrics.words import Asked, Metric, references

_CONTROL = re.compile(r"[\x00-\x1f]")


def string_match_all(turn: Asked, reply: str) -> float:
    """The share of the references that occur in the reply, whatever their case."""
    return _found(turn, reply) / len(references(turn))


def string_match_part(turn: Asked, reply: str) -> float:
    """1 if any reference occurs in the reply."""
    return float(_found(turn, reply) > 0)


def _found(turn: Asked, reply: str) -> int:
    text = _CONTROL.sub("", reply.strip()).strip().lower()
    return sum(one.lower() in text for one in references(turn))


METRICS: Mapping[str, Metric] = MappingProxyType(
    {"string_match_all": string_match_all, "string_match_part": string_match_part}
)

_TASKS = ("niah", "vt", "cwe", "fwe", "qa")


def chosen(task: str) -> str | None:
    """The metric of a task of RULER (`niah_single_1`, `qa_2`); None of others."""
    kind = task.split("_")[0]
    if kind not in _TASKS:
        return None
    return "string_match_part" if kind == "qa" else "string_match_all"
