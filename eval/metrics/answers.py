"""What a reply that thinks aloud says in the end: a number, or a letter."""

import itertools
import re
from fractions import Fraction

from kvjax.eval.metrics.boxed import last_box
from kvjax.eval.metrics.numbers import number, numbers

_SAYS = re.compile(r"\banswer\s*(?:is|:)", re.IGNORECASE)
SENTENCE, MOST = 400, 100
"""Characters behind `answer is` that are looked at, and how many times."""
_HASHES = re.compile(r"####\s*([^\n]*)")


def said_number(reply: str) -> Fraction | None:
    """The number that a reply ends in; None without one.

    It is the first behind the first `answer is` that has one in its sentence (behind
    its last `=`, if it has one), else that behind `####`, else that of the last box,
    else the last number.
    """
    for found in itertools.islice(_SAYS.finditer(reply), MOST):
        behind = reply[found.end() : found.end() + SENTENCE]
        sentence = re.split(r"\n|[.!?](?:\s|$)", behind, maxsplit=1)[0]
        said = numbers(sentence.rpartition("=")[2]) or numbers(sentence)
        if said:
            return said[0]
    if found := _HASHES.search(reply):
        if said := numbers(found[1]):
            return said[0]
    if (box := last_box(reply)) and (value := number(box)) is not None:
        return value
    said = numbers(reply)
    return said[-1] if said else None


def said_letter(reply: str, letters: str) -> str | None:
    """The letter that a reply chooses; None without one.

    It is the first behind `answer is` in its sentence, else one that begins the reply,
    else the last one in brackets, else the last that stands alone.

    Args:
        reply: what was written.
        letters: those that there are, `ABCD`.
    """
    alone = rf"(?<![A-Za-z'])[{letters}](?![A-Za-z'])"
    for found in itertools.islice(_SAYS.finditer(reply), MOST):
        behind = reply[found.end() : found.end() + SENTENCE]
        sentence = re.split(r"\n|\.\s", behind, maxsplit=1)[0]
        if said := re.search(alone, sentence):
            return said[0]
    if said := re.match(rf"[\s(*]*({alone})", reply):
        rest = reply[said.end() :]
        if not (said[1] == "A" and re.match(r" [a-z]", rest)):  # the article
            return said[1]
    for pattern in (rf"\(([{letters}])\)", rf"({alone})"):
        if every := re.findall(pattern, reply):
            return every[-1]
    return None
