r"""AIME25 and MATH-500: the answer in the last `\boxed{...}`.

Source: kvpress' data and scorers (`evaluation/benchmarks/{aime25,math500}`).
Deviations of `boxed`: the published scorers end a box at its first closing brace, so
that `\boxed{\frac{1}{2}}` is never right; MATH-500's takes the first box; both compare
character by character. Here braces are balanced, the last box counts, and what says the
same in LaTeX is the same (spaces, `\left`, `\dfrac`, `\text`, a full stop, signs of
money, degree and per cent), numbers by their value (`070` is 70, `1,000` is 1000). The
published rules are `kvpress_aime25` and `kvpress_math500`.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

from kvjax.eval.metrics.numbers import number
from kvjax.eval.metrics.words import Asked, Metric, best

_BRACE = re.compile(r"(?:boxed|fbox)\s{0,9}\{|[{}]")
LONGEST = 2000
"""Characters of what a box holds."""


def last_box(reply: str) -> str | None:
    """What the last box holds, up to the brace that closes it; None without one."""
    opened: list[tuple[int, bool]] = []
    last = (-1, -1)
    for found in _BRACE.finditer(reply):
        if found[0] != "}":
            opened.append((found.end(), len(found[0]) > 1))
        elif opened:
            begin, boxed = opened.pop()
            last = max(last, (begin, found.start())) if boxed else last
    begin, end = last
    return reply[begin:end] if 0 <= end - begin <= LONGEST and begin >= 0 else None


_SAME = (
    (re.compile(r",\\!"), ","),  # thousands
    (re.compile(r"\\[!,;: ]|~|\\q?quad\b"), " "),
    (re.compile(r"\\(?:left|right|big|Big)(?![a-zA-Z])"), ""),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\\$|\$|\\%|%"), ""),
    (re.compile(r"\\(?:text|mbox|mathrm|textbf)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\frac\s*([0-9])\s*([0-9])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\sqrt\s*([0-9a-zA-Z])"), r"\\sqrt{\1}"),
    (re.compile(r"\.$"), ""),
)


def same_form(answer: str) -> str:
    """An answer without what LaTeX writes in more than one way."""
    for pattern, new in _SAME:
        answer = pattern.sub(new, answer).strip()
    value = number(answer)
    return "".join(answer.split()) if value is None else str(value)


def boxed(turn: Asked, reply: str) -> float:
    """1 if the last box holds the answer."""
    found = last_box(reply)
    said = None if found is None else same_form(found)
    return best(turn, lambda one: float(same_form(one) == said))


def kvpress_aime25(turn: Asked, reply: str) -> float:
    """The text between the last `boxed{` and the next brace, as published."""
    said = reply.split("boxed{")[-1].split("}")[0]
    return best(turn, lambda one: float(one == said))


def kvpress_math500(turn: Asked, reply: str) -> float:
    """The text between the first `boxed{` and the next brace, as published."""
    said = reply.split("boxed{")[1].split("}")[0] if "boxed{" in reply else None
    return best(turn, lambda one: float(one == said))


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "boxed": boxed,
        "kvpress_aime25": kvpress_aime25,
        "kvpress_math500": kvpress_math500,
    }
)


def chosen(task: str) -> str | None:
    """The metric of all their rows, which name no task."""
    del task
    return "boxed"
