"""InfiniteBench: one rule for each of its tasks.

Source: Zhang et al. 2024, as kvpress scores its data (`evaluation/benchmarks/
infinite_bench`). Deviations, each where the published rule takes something else than
what it says:

- numbers are compared as numbers: kvpress stores answers as texts and compares them
  with integers, so that `code_run` and `math_calc` are never right there, and
  `math_find` stops with an error;
- a minus belongs to its number;
- the letter of a choice stands alone: `Because` is no B;
- `code_debug` takes the answers that kvpress' data has, letters, beside names.

Summaries (`longbook_sum_eng`) are not scored by kvpress either; `rouge_l` is one way.
"""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from kvjax.eval.metrics.words import Asked, Metric, best, references
from kvjax.messages import shown

_MARKS = str.maketrans(dict.fromkeys("\n:\"'.,?!{}", " "))
_CODE_MARKS = str.maketrans(dict.fromkeys("\n.`'\":", " "))
_NUMBER = re.compile(r"(?<![\d.])-?\d+(?:\.\d+)?")


def word(turn: Asked, reply: str) -> float:
    """1 if a reference is a word of the reply."""
    words = reply.translate(_MARKS).split()
    return best(turn, lambda one: float(one in words))


def first_digits(turn: Asked, reply: str) -> float:
    """1 if the first digits in the reply are those of a reference."""
    found = re.search("[0-9]+", reply)
    return best(turn, lambda one: float(bool(found) and found[0] == one))


def last_integer(turn: Asked, reply: str) -> float:
    """1 if the last word is the integer."""
    words = reply.translate(_CODE_MARKS).split() or [""]
    said = int(words[-1]) if re.fullmatch(r"[-+]?[0-9]{1,300}", words[-1]) else None
    return best(turn, lambda one: float(_number(one) == said))


def first_number(turn: Asked, reply: str) -> float:
    """1 if the first number in the reply is the reference."""
    found = _NUMBER.search(reply)
    said = float(found[0]) if found else None
    return best(turn, lambda one: float(_number(one) == said))


def running_values(turn: Asked, reply: str) -> float:
    """The share of the values that are right before the first wrong one."""
    wanted = [_number(one) for one in references(turn)]
    found = [float(one) for one in _NUMBER.findall(reply)]
    right = 0
    for one, other in zip(wanted, found, strict=False):
        if one != other:
            break
        right += 1
    return right / len(wanted)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"the metric needs answers that are numbers; got {shown(text)}."
        ) from None


def contained(turn: Asked, reply: str) -> float:
    """1 if a reference occurs in the reply, whatever its case."""
    text = reply.strip().upper()
    return best(turn, lambda one: float(one.upper() in text))


_BEFORE = ("answer is:", "answer:", "answer is", "option is")
_BEFORE_CODE = ("answer is:", "is:", "answer:")
"""What says that the answer follows; the first of them that occurs counts."""


def choice(turn: Asked, reply: str) -> float:
    """1 for the letter of A to D: said last, first, or behind `answer is`."""
    right, text = references(turn), reply.strip()
    return float(_said(right, text, "A-D", _BEFORE) or _first(right, text))


def code_choice(turn: Asked, reply: str) -> float:
    """1 for the letter of the function, of A to J, or for its name."""
    return float(_said(references(turn), reply.strip(), "A-J", _BEFORE_CODE))


def _said(right: Sequence[str], text: str, letters: str, before: Sequence[str]) -> bool:
    """Whether it is the last letter of a line, or begins the text or the answer."""
    lines = (re.findall(rf"\b[{letters}]\b", line) for line in text.split("\n"))
    last = next((found[-1] for found in lines if found), None)  # of the first such line
    if last in right:
        return True
    places = [text]
    for prefix in before:
        if prefix in text:
            places.append(text.partition(prefix)[2].strip())
            break
    begins = "|".join(re.escape(one) for one in right)
    return any(re.match(rf"(?:{begins})(?!\w)", place) for place in places)


def _first(right: Sequence[str], text: str) -> bool:
    """Whether it is the first letter, where nothing says which one is the answer."""
    if any(prefix in text for prefix in _BEFORE):
        return False
    first = re.search(r"\b[A-D]\b", text)
    return bool(first) and first[0] in right


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "word": word,
        "first_digits": first_digits,
        "last_integer": last_integer,
        "first_number": first_number,
        "running_values": running_values,
        "contained": contained,
        "choice": choice,
        "code_choice": code_choice,
    }
)

_TASKS = {
    "kv_retrieval": "word",
    "kv_retrieval_prefix": "word",
    "kv_retrieval_both": "word",
    "passkey": "first_digits",
    "number_string": "first_digits",
    "code_run": "last_integer",
    "code_debug": "code_choice",
    "longdialogue_qa_eng": "contained",
    "longbook_qa_eng": "qa_f1",
    "longbook_qa_chn": "qa_f1_zh",
    "longbook_choice_eng": "choice",
    "math_find": "first_number",
    "math_calc": "running_values",
}


def chosen(task: str) -> str | None:
    """The metric of a task of InfiniteBench; None of others.

    Raises:
        ValueError: it is the summaries'.
    """
    if task == "longbook_sum_eng":
        raise ValueError(
            "'longbook_sum_eng' is not scored by kvpress. `metric: rouge_l` is one way."
        )
    return _TASKS.get(task)
